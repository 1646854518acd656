// "Load" reads a file of the person's into the page: nothing is uploaded.
document.addEventListener("click", (event) => {
  if (!event.target.closest("#load")) return;
  const input = Object.assign(document.createElement("input"), { type: "file", accept: ".json" });
  input.addEventListener("change", async () => {
    const box = document.querySelector("#loaded textarea");
    box.value = await input.files[0].text();
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.dispatchEvent(new Event("blur")); // on which Gradio sends it; "input" is a key press to it
  });
  input.click();
});

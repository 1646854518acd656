# docker build -f docker/cpu.Dockerfile -t lit-rlhf . && docker run -v "$PWD/runs:/data/runs" lit-rlhf debug=fast logger=csv
FROM python:3.12-slim
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --no-deps -c constraints/cpu.txt torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -c constraints/cpu.txt ".[ui,lora]"
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["lit-rlhf"]

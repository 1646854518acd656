"""Drawing responses from a policy: the engine's protocol, and engines."""

from lit_rlhf.rollouts.engine import (
    Ended as Ended,
    Engine as Engine,
    Request as Request,
    Response as Response,
    Responses as Responses,
    Sampling as Sampling,
    Temperature as Temperature,
    draw_seeds as draw_seeds,
    padded_responses as padded_responses,
    sample as sample,
)
from lit_rlhf.rollouts.fast import (
    FastEngine as FastEngine,
    Growing as Growing,
    answer_texts as answer_texts,
    fitted as fitted,
    generate as generate,
    rows_that_fit as rows_that_fit,
    stream_response as stream_response,
)
from lit_rlhf.rollouts.transformers import TransformersEngine as TransformersEngine
from lit_rlhf.rollouts.vllm import VLLMEngine as VLLMEngine

"""Records: the data formats of every stage, read from JSONL, JSON, CSV, Parquet, plain text or a Hub name.

A prompt is always kept as messages (one or several turns). Every bad record is named by file, line and reason."""

from lit_rlhf.text.records.demonstrations import Demonstration, parse_demonstration
from lit_rlhf.text.records.feedback import Feedback, parse_feedback, rankings_of_feedback
from lit_rlhf.text.records.fields import Row
from lit_rlhf.text.records.files import (
    Loaded,
    OnBadRecord,
    Seen,
    bad_record,
    files_of,
    load_records,
    read_pieces,
    read_records,
    write_jsonl,
)
from lit_rlhf.text.records.labelled import (
    Labelled,
    LabelledText,
    MultipleChoice,
    OpenQuestion,
    Similarity,
    Task,
    parse_labelled,
    parse_task,
    task_prompt,
)
from lit_rlhf.text.records.messages import (
    Message,
    Messages,
    is_learned,
    parse_messages,
    parse_transcript,
    shown,
    text_of,
)
from lit_rlhf.text.records.prompts import PromptRecord, parse_prompt, parse_prompt_record, parse_text
from lit_rlhf.text.records.rankings import Ranking, parse_ranking
from lit_rlhf.text.records.split import Moved, is_held_out, prompt_fingerprint, prompt_key, split_by_prompt

__all__ = [
    "Demonstration",
    "Feedback",
    "Labelled",
    "LabelledText",
    "Loaded",
    "Message",
    "Messages",
    "Moved",
    "MultipleChoice",
    "OnBadRecord",
    "OpenQuestion",
    "PromptRecord",
    "Ranking",
    "Row",
    "Seen",
    "Similarity",
    "Task",
    "bad_record",
    "files_of",
    "is_held_out",
    "is_learned",
    "load_records",
    "parse_demonstration",
    "parse_feedback",
    "parse_labelled",
    "parse_messages",
    "parse_prompt",
    "parse_prompt_record",
    "parse_ranking",
    "parse_task",
    "parse_text",
    "parse_transcript",
    "prompt_fingerprint",
    "prompt_key",
    "rankings_of_feedback",
    "read_pieces",
    "read_records",
    "shown",
    "split_by_prompt",
    "task_prompt",
    "text_of",
    "write_jsonl",
]

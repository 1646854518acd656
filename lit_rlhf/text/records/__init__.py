"""Records: the data formats of every stage, read from JSONL, JSON, CSV, Parquet, plain text or a Hub name.

A prompt is always kept as messages (one or several turns). Every bad record is named by file, line and reason."""

from lit_rlhf.text.records.demonstrations import (
    Demonstration as Demonstration,
    parse_demonstration as parse_demonstration,
)
from lit_rlhf.text.records.feedback import (
    Feedback as Feedback,
    parse_feedback as parse_feedback,
    rankings_of_feedback as rankings_of_feedback,
    rating_scale as rating_scale,
)
from lit_rlhf.text.records.files import (
    OnBadRecord as OnBadRecord,
    Seen as Seen,
    bad_record as bad_record,
    load_records as load_records,
    read_pieces as read_pieces,
    read_records as read_records,
    write_jsonl as write_jsonl,
)
from lit_rlhf.text.records.labelled import (
    Labelled as Labelled,
    LabelledText as LabelledText,
    MultipleChoice as MultipleChoice,
    OpenQuestion as OpenQuestion,
    Similarity as Similarity,
    Task as Task,
    parse_labelled as parse_labelled,
    parse_task as parse_task,
    task_prompt as task_prompt,
)
from lit_rlhf.text.records.messages import (
    Message as Message,
    Messages as Messages,
    answer_turn as answer_turn,
    is_learned as is_learned,
    parse_messages as parse_messages,
    shown as shown,
    text_of as text_of,
)
from lit_rlhf.text.records.prompts import (
    PromptRecord as PromptRecord,
    parse_prompt as parse_prompt,
    parse_prompt_record as parse_prompt_record,
    parse_text as parse_text,
)
from lit_rlhf.text.records.rankings import Ranking as Ranking, parse_ranking as parse_ranking, ranks_of as ranks_of
from lit_rlhf.text.records.sources import (
    Paths as Paths,
    entries_of as entries_of,
    files_of as files_of,
    format_of as format_of,
    identity_of as identity_of,
)
from lit_rlhf.text.records.split import (
    Moved as Moved,
    is_held_out as is_held_out,
    prompt_fingerprint as prompt_fingerprint,
    prompt_key as prompt_key,
    split_by_prompt as split_by_prompt,
)
from lit_rlhf.text.records.stored import (
    Reading as Reading,
    Records as Records,
    is_whole as is_whole,
    kinds_of as kinds_of,
    read_note as read_note,
    records_key as records_key,
    stored_records as stored_records,
    write_note as write_note,
)

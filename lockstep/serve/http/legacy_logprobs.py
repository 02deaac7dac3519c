"""Log-probabilities in the shape of /v1/completions: parallel lists, alternatives by their text."""

from lockstep.serve.http.encode import in_parts
from lockstep.serve.tokenizer import Detokenizer, Tokenizer, answer_reader


def token_text(tokenizer: Tokenizer | None, token_id):
    """A token as text; its bytes, where they are no text by themselves; its id, where there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class LegacyLogprobs:
    """Those of one sequence, asked for from its beginning to its end. text_offset counts characters of the answer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._offset, self._reader = tokenizer, 0, None

    def prompt(self, request):
        """Those of the prompt: nothing is known of its first token."""
        self._reader = Detokenizer(self._tokenizer) if self._tokenizer else None
        made = self._part(request.prompt_ids, [None, *request.prompt_logprobs], [None, *request.prompt_top_logprobs])
        made["top_logprobs"][0] = None
        return made

    def output(self, request, start, end):
        """Those of output tokens start .. end."""
        if self._reader is None and self._tokenizer is not None:
            self._reader = answer_reader(self._tokenizer, request)
        return self._part(request.output_ids[start:end], request.logprobs[start:end], request.top_logprobs[start:end])

    def whole(self, request, with_prompt, num_output):
        """Those of a finished request's first output tokens, after the prompt's if it is wanted, as Parts.

        The alternatives, of which there are most, come first: the other lists are filled meanwhile.
        """
        ids, logprobs, tops = request.output_ids[:num_output], request.logprobs, request.top_logprobs
        if with_prompt:
            num_prompt = len(request.prompt_ids)
            tops = [*self._tops([None, *request.prompt_top_logprobs], num_prompt), *tops]
            ids, logprobs = request.prompt_ids + ids, [None, *request.prompt_logprobs, *logprobs]
            self._reader = Detokenizer(self._tokenizer) if self._tokenizer else None
        elif self._tokenizer is not None:
            self._reader = answer_reader(self._tokenizer, request)
        columns = dict(tokens=[], token_logprobs=[], text_offset=[])

        def alternatives(start, end):
            made = self._part(ids[start:end], logprobs[start:end], tops[start:end])
            for name, column in columns.items():
                column += made[name]
            return [None, *made["top_logprobs"][1:]] if with_prompt and not start else made["top_logprobs"]

        filled = {
            name: in_parts(len(ids), lambda start, end, column=column: column[start:end])
            for name, column in columns.items()
        }
        return dict(top_logprobs=in_parts(len(ids), alternatives), **filled)

    def _part(self, ids, logprobs, tops):
        top_logprobs = [
            self._alternatives(*each) for each in zip(ids, logprobs, self._tops(tops, len(ids)), strict=True)
        ]
        offsets, texts = zip(*map(self._advance, ids), strict=True) if ids else ((), ())
        return dict(tokens=list(texts), token_logprobs=logprobs, top_logprobs=top_logprobs, text_offset=list(offsets))

    def _tops(self, tops, count):
        return tops + [{}] * (count - len(tops))

    def _alternatives(self, token_id, logprob, top):
        """{text: log-probability}, best first and with the token itself; of ids with the same text the best counts."""
        made = {}
        for other, value in top.items() if top else ():
            made.setdefault(token_text(self._tokenizer, other), value)
        made.setdefault(token_text(self._tokenizer, token_id), logprob)
        return made

    def _advance(self, token_id):
        """Where a token's text begins, and the text: for the first of a text without the space that begins one."""
        at, text = self._offset, token_text(self._tokenizer, token_id)
        if self._reader is None:
            return at, text
        begins_text, shown = self._reader.at_start, self._reader.push(token_id)
        self._offset += len(shown)
        return at, shown if begins_text and text == " " + shown else text


def joined(first, second):
    """Two parts, one after the other."""
    return {name: first[name] + second[name] for name in first}

"""The scheduler's rules once more, as simply as they can be said: sets of free pages and one loop."""
PAGE_TOKENS = 64


class Naive:
    """Requests are [name, prompt length, max_tokens, computed, known, pages, slot]; lists are in order of arrival."""

    def __init__(self, budget, num_slots, num_pages):
        self.budget, self.slots, self.pages = budget, list(range(num_slots)), list(range(num_pages))
        self.waiting, self.running = [], []

    def add(self, name, prompt, max_tokens):
        self.waiting.append(dict(name=name, known=prompt, room=prompt + max_tokens, computed=0, pages=[], slot=None))

    def step(self):
        """[(name, tokens, pages, slot)]: those with one token left first, then prompts, each in order of arrival."""
        while self.waiting and self.slots and len(self.pages) >= -(-self.waiting[0]["room"] // PAGE_TOKENS):
            request = self.waiting.pop(0)
            count = -(-request["room"] // PAGE_TOKENS)
            request["pages"], self.pages = self.pages[:count], self.pages[count:]
            request["slot"] = self.slots.pop(0)
            self.running.append(request)
        left, plan = self.budget, []
        for decodes in (True, False):
            for r in self.running:
                missing = r["known"] - r["computed"]
                if (missing == 1) == decodes and min(missing, left):
                    plan.append((r["name"], min(missing, left), r["pages"], r["slot"]))
                    left -= min(missing, left)
        return plan

    def done(self, plan):
        """Marks a step's tokens as computed; who has none missing gets one more."""
        counts = {name: n for name, n, *_ in plan}
        for r in self.running:
            r["computed"] += counts.get(r["name"], 0)
            r["known"] += r["computed"] == r["known"]

    def end(self, name):
        for r in self.running:
            if r["name"] == name:
                # what was freed last is taken first, in the order in which it was held
                self.pages, self.slots = r["pages"] + self.pages, [r["slot"]] + self.slots
        self.waiting = [r for r in self.waiting if r["name"] != name]
        self.running = [r for r in self.running if r["name"] != name]

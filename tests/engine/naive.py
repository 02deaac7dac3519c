"""The scheduler's rules once more, as simply as they can be said: lists, dicts of whole prefixes, and loops."""

PAGE_TOKENS = 64


class Naive:
    """Requests are dicts; `tokens` are all that are known, the salt in front of them is part of what a page holds."""

    def __init__(self, budget, num_slots, num_pages, caches=True):
        self.budget, self.slots, self.caches, self.preempted = budget, list(range(num_slots)), caches, 0
        self.free, self.idle = list(range(num_pages)), []  # in the order in which they are taken
        self.holders, self.content = {p: 0 for p in range(num_pages)}, {}  # content: page -> the prefix that ends in it
        self.promised = {}  # prefix -> the running request that computes it
        self.requests = []

    def add(self, name, prompt, max_tokens, priority, salt):
        self.requests.append(
            dict(name=name, tokens=list(prompt), priority=priority, salt=salt, computed=0, pages=[], slot=None)
        )
        self.requests.sort(key=lambda r: (r["priority"], r["name"]))

    def running(self):
        return [r for r in self.requests if r["slot"] is not None]

    def prefixes(self, r, count):
        return [(r["salt"], *r["tokens"][: (i + 1) * PAGE_TOKENS]) for i in range(count)]

    def usable(self, r):
        return self.prefixes(r, (len(r["tokens"]) - 1) // PAGE_TOKENS if self.caches else 0)

    def page_of(self, prefix):
        return next((p for p, held in self.content.items() if held == prefix), None)

    def take(self):
        page = self.free.pop(0) if self.free else self.idle.pop(0)
        self.content.pop(page, None)
        self.holders[page] = 1
        return page

    def give_back(self, r):
        for page in reversed(r["pages"]):
            self.holders[page] -= 1
            if not self.holders[page]:
                self.idle.append(page) if page in self.content else self.free.insert(0, page)
        self.slots.insert(0, r["slot"])
        self.promised = {prefix: who for prefix, who in self.promised.items() if who is not r}
        r.update(pages=[], slot=None, computed=0)

    def admit(self):
        for r in [r for r in self.requests if r["slot"] is None]:
            if not self.slots:
                return
            if any(p in self.promised and self.promised[p]["priority"] <= r["priority"] for p in self.usable(r)):
                continue
            hits = []
            for prefix in self.usable(r):
                if self.page_of(prefix) is None:
                    break
                hits.append(self.page_of(prefix))
            total = -(-len(r["tokens"]) // PAGE_TOKENS)
            room = len(self.free) + len(self.idle) - sum(p in self.idle for p in hits)
            if room - (total - len(hits)) < len(self.running()):
                return
            for page in hits:
                self.idle = [p for p in self.idle if p != page]
                self.holders[page] += 1
            r["slot"], r["computed"] = self.slots.pop(0), PAGE_TOKENS * len(hits)
            r["pages"] = hits + [self.take() for _ in range(total - len(hits))]
            for prefix in self.usable(r)[len(hits) :]:
                self.promised.setdefault(prefix, r)

    def step(self):
        """[(name, tokens, pages, slot)]: those with one token left first, then prompts."""
        self.admit()
        left, plan = self.budget, []
        for r in self.running():
            if len(r["tokens"]) - r["computed"] == 1 and r["slot"] is not None and left:
                while r["slot"] is not None and r["computed"] == PAGE_TOKENS * len(r["pages"]):
                    if self.free or self.idle:
                        r["pages"].append(self.take())
                    else:
                        self.preempted += 1
                        self.give_back(self.running()[-1])
                if r["slot"] is not None:
                    plan.append((r, 1))
                    left -= 1
        prompts = [(r, len(r["tokens"]) - r["computed"]) for r in self.running()]
        prompts = [(r, missing) for r, missing in prompts if missing > 1]
        if prompts and left:
            first, missing = prompts[0]
            half, order = (
                min(missing, (left + 1) // 2),
                sorted(prompts, key=lambda p: (p[0]["priority"], p[1], p[0]["name"])),
            )
            turn = [r for r, _ in order].index(first)
            for i, (r, missing) in enumerate(order):
                count = min(missing, left - half if i < turn else left)
                left -= count
                plan += [(r, count)] * (count > 0)
        return [(r["name"], count, list(r["pages"]), r["slot"]) for r, count in plan]

    def done(self, plan, token):
        """Marks a step's tokens as computed; who has none missing gets one more."""
        counts = {name: n for name, n, *_ in plan}
        for r in (r for r in self.running() if r["name"] in counts):
            before = r["computed"] // PAGE_TOKENS
            r["computed"] += counts[r["name"]]
            full = self.prefixes(r, r["computed"] // PAGE_TOKENS) if self.caches else []
            for prefix, page in list(zip(full, r["pages"], strict=False))[before:]:
                if page not in self.content and self.page_of(prefix) is None:
                    self.content[page] = prefix
                if self.promised.get(prefix) is r:
                    del self.promised[prefix]
            if r["computed"] == len(r["tokens"]):
                r["tokens"].append(token)

    def end(self, name):
        for r in self.requests:
            if r["name"] == name and r["slot"] is not None:
                self.give_back(r)
        self.requests = [r for r in self.requests if r["name"] != name]

"""The scheduler's rules again, written as simply as possible: with lists, dicts of whole prefixes, and loops."""

PAGE_TOKENS = 64


class NaiveGroup:
    """The pages of layers with a window; 0: no window."""

    def __init__(self, num_pages, window):
        self.window = window
        touched = [len({p // PAGE_TOKENS for p in range(i, i + window)}) for i in range(PAGE_TOKENS)]
        self.most = max(touched)  # blocks that as many tokens lie on
        self.free, self.idle = list(range(num_pages)), []  # in the order in which they are taken
        self.holders, self.content = {p: 0 for p in range(num_pages)}, {}  # content: page -> the prefix that ends in it

    def sees(self, position, block):
        """Whether a token at a position sees any token of a block."""
        first, last = block * PAGE_TOKENS, block * PAGE_TOKENS + PAGE_TOKENS - 1
        return first <= position and (not self.window or last > position - self.window)

    def page_of(self, prefix):
        return next((p for p, held in self.content.items() if held == prefix), None)

    def take(self):
        page = self.free.pop(0) if self.free else self.idle.pop(0)
        self.content.pop(page, None)
        self.holders[page] = 1
        return page

    def share(self, page):
        self.idle = [p for p in self.idle if p != page]
        self.holders[page] += 1
        return page

    def give_back(self, pages, wanted=True):
        for page in reversed(pages):
            self.holders[page] -= 1
            if not self.holders[page] and page in self.content:
                self.idle.insert(len(self.idle) if wanted else 0, page)
            elif not self.holders[page]:
                self.free.insert(0, page)

    def needed(self, num_tokens):
        """The most blocks that a request of num_tokens tokens holds while it is computed token by token."""
        total = -(-num_tokens // PAGE_TOKENS)
        return min(total, self.most) if self.window else total


class Naive:
    """Requests are dicts; `tokens` are all that are known, the salt in front of them is part of what a page holds;
    `pages` are {block: page} of each group."""

    def __init__(self, budget, num_slots, groups, caches=True, num_spare=0):
        self.budget, self.slots, self.caches = budget, list(range(num_slots)), caches
        self.num_spare, self.preempted, self.made_way = num_spare, 0, 0
        self.groups = [NaiveGroup(*group) for group in groups]
        self.promised = {}  # prefix -> the running request that computes it
        self.requests = []

    def add(self, name, prompt, max_tokens, priority, salt, is_moved=False):
        self.requests.append(
            dict(
                name=name,
                tokens=list(prompt),
                stops=[(len(prompt) - 1) // PAGE_TOKENS, 0],
                priority=priority,
                salt=salt,
                computed=0,
                pages=[],
                slot=None,
                is_moved=is_moved,
                num_given=len(prompt),
            )
        )
        self.requests.sort(key=lambda r: (r["priority"], r["name"]))

    def running(self):
        return [r for r in self.requests if r["slot"] is not None]

    def prefixes(self, r, count):
        return [(r["salt"], *r["tokens"][: (i + 1) * PAGE_TOKENS]) for i in range(count)]

    def usable(self, r):
        return self.prefixes(r, (len(r["tokens"]) - 1) // PAGE_TOKENS if self.caches else 0)

    def give_back(self, r):
        for group, pages in zip(self.groups, r["pages"], strict=True):
            group.give_back(list(pages.values()))
        self.slots.insert(0, r["slot"])
        self.promised = {prefix: who for prefix, who in self.promised.items() if who is not r}
        r.update(pages=[], slot=None, computed=0)

    def admit(self):
        passed = []
        while waiting := [r for r in self.requests if r["slot"] is None and r["name"] not in passed]:
            r = waiting[0]
            if not self.has_slot(r):
                if self.make_way(r):
                    continue
                return
            if any(p in self.promised and self.promised[p]["priority"] <= r["priority"] for p in self.usable(r)):
                passed.append(r["name"])
                continue
            first, found = self.longest(self.usable(r))
            r["stops"][1] = self.known(self.usable(r))
            if not all(self.has_room(i, r, blocks) for i, blocks in enumerate(found)):
                if self.make_way(r):
                    continue
                return
            pages = [
                {b: group.share(page) for b, page in blocks.items()}
                for group, blocks in zip(self.groups, found, strict=True)
            ]
            r.update(slot=self.slots.pop(0), computed=PAGE_TOKENS * first, pages=pages)
            for group, pages in zip(self.groups, r["pages"], strict=True):
                for block in range(first, group.needed(len(r["tokens"])) if not group.window else 0):
                    pages[block] = group.take()
            for prefix in self.usable(r)[first:]:
                self.promised.setdefault(prefix, r)

    def has_slot(self, r):
        return len(self.slots) > (0 if r["is_moved"] else self.num_spare)

    def make_way(self, r):
        """Preempts, for a request that was moved, the last one after it that has given no token; False without one."""
        after = [o for o in self.running() if (o["priority"], o["name"]) > (r["priority"], r["name"])]
        young = [o for o in after if not o["is_moved"] and len(o["tokens"]) == o["num_given"]]
        if not r["is_moved"] or not young:
            return False
        self.preempted += 1
        self.made_way += 1
        self.give_back(young[-1])
        return True

    def known(self, prefixes):
        """How many of the first blocks the layers without a window have."""
        missing = [i for i, p in enumerate(prefixes) for g in self.groups if not g.window and g.page_of(p) is None]
        return min(missing, default=len(prefixes))

    def longest(self, prefixes):
        """The blocks of the longest prefix after which all that the next token sees is cached: how many, and of each
        group {block: page} of what it sees."""
        for count in range(len(prefixes), 0, -1):
            found = [
                {b: g.page_of(prefixes[b]) for b in range(count) if g.sees(count * PAGE_TOKENS, b)} for g in self.groups
            ]
            if not any(None in blocks.values() for blocks in found):
                return count, found
        return 0, [{} for _ in self.groups]

    def has_room(self, index, r, found):
        group = self.groups[index]
        room = len(group.free) + len(group.idle) - sum(page in group.idle for page in found.values())
        return room - self.lacks(index, None) - (group.needed(len(r["tokens"])) - len(found)) >= len(self.running())

    def lacks(self, index, r):
        """How many pages of a group with a window all running requests but this one have yet to take."""
        group, others = self.groups[index], [o for o in self.running() if o is not r]
        lacks = [group.needed(len(o["tokens"])) - len(o["pages"][index]) for o in others if group.window]
        return sum(n for n in lacks if n > 0)

    def grow(self, r, count):
        """Takes pages for up to `count` tokens; returns for how many tokens there were pages."""
        while r["slot"] is not None:
            for possible in range(count, 0, -1):
                wanted = [self.missing(r, i, possible) for i in range(len(self.groups))]
                free = [len(g.free) + len(g.idle) - self.lacks(i, r) for i, g in enumerate(self.groups)]
                if possible == 1:
                    free = [len(g.free) + len(g.idle) for g in self.groups]
                if all(len(w) <= max(0, n) for w, n in zip(wanted, free, strict=True)):
                    for group, pages, blocks in zip(self.groups, r["pages"], wanted, strict=True):
                        pages.update({block: group.take() for block in blocks})
                    return possible
            self.preempted += 1
            self.give_back(self.running()[-1])
        return 0

    def missing(self, r, index, count):
        """The blocks of a request's next `count` tokens for which it has no page in a group."""
        blocks = range(r["computed"] // PAGE_TOKENS, (r["computed"] + count - 1) // PAGE_TOKENS + 1)
        return [block for block in blocks if block not in r["pages"][index]]

    def step(self):
        """[(name, tokens, pages, slot)] of the next step: first the requests with one token left, then prompts."""
        self.admit()
        left, plan = self.budget, []
        for r in self.running():
            if len(r["tokens"]) - r["computed"] == 1 and r["slot"] is not None and left and self.grow(r, 1):
                plan.append((r, 1))
                left -= 1
        prompts = [(r, len(r["tokens"]) - r["computed"]) for r in self.running()]
        prompts = [(r, missing) for r, missing in prompts if missing > 1]
        if prompts and left:
            first, missing = prompts[0]
            kept, order = (
                min(missing, (left + 3) // 4),
                sorted(prompts, key=lambda p: (p[0]["priority"], p[1], p[0]["name"])),
            )
            turn = [r for r, _ in order].index(first)
            for i, (r, missing) in enumerate(order):
                most = min(missing, left - kept if i < turn else left)
                count = self.grow(r, most) if most else 0
                left -= count
                plan += [(r, count)] * (count > 0)
        return [
            (r["name"], count, [dict(pages) for pages in r["pages"]], r["slot"])
            for r, count in plan
            if r["slot"] is not None
        ]

    def done(self, plan, token):
        """Marks a step's tokens as computed; a request without tokens left gets one more."""
        counts = {name: n for name, n, *_ in plan}
        for r in (r for r in self.running() if r["name"] in counts):
            before = r["computed"] // PAGE_TOKENS
            r["computed"] += counts[r["name"]]
            full = self.prefixes(r, r["computed"] // PAGE_TOKENS) if self.caches else []
            for block, prefix in list(enumerate(full))[before:]:
                for group, pages in zip(self.groups, r["pages"], strict=True):
                    if pages[block] not in group.content and group.page_of(prefix) is None:
                        group.content[pages[block]] = prefix
                if self.promised.get(prefix) is r:
                    del self.promised[prefix]
            self.drop(r)
            if r["computed"] == len(r["tokens"]):
                r["tokens"].append(token)

    def drop(self, r):
        """Gives back the blocks that neither the next token nor a later one sees."""
        for group, pages in zip(self.groups, r["pages"], strict=True):
            gone = [b for b in pages if (b + 1) * PAGE_TOKENS <= r["computed"] and not group.sees(r["computed"], b)]
            for block in gone:
                wanted = [s for s in r["stops"] if block < s and group.sees(s * PAGE_TOKENS, block)]
                group.give_back([pages.pop(block)], bool(wanted))

    def end(self, name):
        for r in self.requests:
            if r["name"] == name and r["slot"] is not None:
                self.give_back(r)
        self.requests = [r for r in self.requests if r["name"] != name]

"""Several engines of one model, each in a process of its own, behind one StreamEngine: a stream whose process dies goes
on, byte for byte, in another.

The front (`front.FrontModel`, `fleet.Fleet`) has the tokenizer, the requests and their texts; a replica (`worker`) has
the engine. The front keeps of each request all that is known of its answer, so that it can be handed to another replica
at any time (`RequestMaker.make_known`). `messages` are what they tell each other; a `Carrier` starts the processes.
"""

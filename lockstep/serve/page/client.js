// Requests to the server, and its answers as they stream in.

// The most tokens of an answer where the settings do not say: to a message, what others who ask at the same time leave
// room for (each has its alternatives, too); to a text, as few models end one.
export const MOST = { chat: 16384, continuation: 256 };

/** A request that failed, with a message for the reader. status: the HTTP status, 0 where there was no response. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The figures of the server, see routes/page.py. */
export async function figures(key) {
  return (await reach("/page/figures", { headers: headers(key) })).json();
}

/**
 * Yields the pieces of an answer: {text, thought, tokens, finish, receipt, usage, fingerprint}, all but tokens optional.
 * request: {path, body} as `chat` and `continuation` make them. Throws a Refusal, or an AbortError after `signal` aborts.
 */
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request.body, stream: true, stream_options: { include_usage: true } });
  const response = await reach(request.path, { method: "POST", headers: headers(key), body, signal });
  for await (const event of events(response.body)) {
    if (event.error) throw new Refusal(sentence(event.error.message));
    yield piece(event);
  }
}

/** What the server finds of an answer's receipt, and whether it is of this request: {verdict, reason, ...}. */
export async function verify(receipt, request, key, signal) {
  const body = JSON.stringify({ receipt, request: request.body });
  return (await reach("/v1/receipts/verify", { method: "POST", headers: headers(key), body, signal })).json();
}

/** A request for the next message of a conversation. */
export function chat(messages, settings) {
  return { path: "/v1/chat/completions", body: { max_tokens: MOST.chat, ...settings, messages, logprobs: true, top_logprobs: 5 } };
}

/** A request to continue a text, for models without a chat template. */
export function continuation(prompt, settings) {
  return { path: "/v1/completions", body: { max_tokens: MOST.continuation, ...settings, prompt, logprobs: 5 } };
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const said = await response.json().then(body => body.error.message, () => `it answered ${response.status}`);
  const seconds = response.headers.get("retry-after");
  const when = seconds ? ` Try again in ${seconds} s.` : "";
  return new Refusal(response.status === 401 ? "This server wants an API key." : sentence(said) + when, response.status);
}

function headers(key) {
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

function sentence(text) {
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}

/** Server-sent events as objects, up to [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) lost();
    const blocks = (left + value).split("\n\n");
    left = blocks.pop();
    for (const block of blocks) {
      if (block === "data: [DONE]") return;
      if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
    }
  }
}

function lost(error) {
  if (error?.name === "AbortError") throw error;
  throw new Refusal("The connection broke off before the answer was complete.");
}

function piece(event) {
  const choice = event.choices[0] ?? {};
  const said = choice.delta ?? choice;
  return {
    text: said.content ?? said.text ?? "",
    thought: said.reasoning_content ?? said.reasoning ?? "",
    tokens: tokens(choice.logprobs),
    finish: choice.finish_reason,
    receipt: choice.receipt,
    usage: event.usage,
    fingerprint: event.system_fingerprint,
  };
}

/** Log-probabilities in either of OpenAI's shapes as [{text, logprob, top: [{text, logprob}]}]. */
function tokens(logprobs) {
  if (logprobs?.content) {
    const plain = ({ token, logprob }) => ({ text: token, logprob });
    return logprobs.content.map(each => ({ ...plain(each), top: each.top_logprobs.map(plain) }));
  }
  return (logprobs?.tokens ?? []).map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([text, logprob]) => ({ text, logprob })),
  }));
}

// Small helpers to make elements, and to copy text.

const COPIED = 1500; // milliseconds for which a button says that it copied

/** An element with a class and text. */
export function make(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A button. title: what it does, where its words do not say all of it. */
export function button(words, does, title = "") {
  const made = make("button", "", words);
  made.type = "button";
  if (title) made.title = title;
  made.addEventListener("click", does);
  return made;
}

/** Copies a text; the button says whether that worked. */
export async function copy(text, button) {
  const words = button.dataset.words ??= button.textContent;
  button.textContent = await copied(text) ? "Copied" : "Not allowed";
  announce(button.textContent);
  clearTimeout(button.timer);
  button.timer = setTimeout(() => { button.textContent = words; }, COPIED);
}

/** Puts a text into the clipboard; pages that came without HTTPS from another machine can do so by selecting it only. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.body.appendChild(make("textarea", "hidden"));
    const focused = document.activeElement;
    field.value = text;
    field.select();
    const worked = document.execCommand("copy");
    field.remove();
    focused?.focus({ preventScroll: true });
    return worked;
  }
}

/** Tells a screen reader. */
export function announce(words) {
  document.getElementById("said").textContent = words;
}

/** Makes a field as high as its text. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// Nodes as plain values, and elements that show them. What has not changed since the last time keeps its element, and
// with it the focus, the selection and what points at it.

import { element } from "/page/text/tokens.js";

const shown = new WeakMap(); // element -> the nodes that it shows

/**
 * Makes an element show these nodes and nothing else. A node is a text, a run of a token, {text, piece}, or an element,
 * {tag, attributes, children}.
 */
export function show(parent, nodes) {
  const before = shown.get(parent) ?? [];
  let child = parent.firstChild;
  nodes.forEach((node, i) => {
    if (!child) {
      parent.append(made(node));
      return;
    }
    const next = child.nextSibling;
    if (!isAlike(before[i], node)) child.replaceWith(made(node));
    else if (node.children && before[i] !== node) show(child, node.children);
    child = next;
  });
  while (child) {
    const next = child.nextSibling;
    child.remove();
    child = next;
  }
  shown.set(parent, nodes);
}

/** Whether the element of one node can become that of the other by a change of its children only. */
function isAlike(one, other) {
  if (one === other) return true;
  if (typeof one === "string" || typeof other === "string") return false;
  if (one.piece || other.piece) return one.piece === other.piece && one.text === other.text;
  if (one.tag !== other.tag) return false;
  const names = Object.keys(one.attributes);
  return names.length === Object.keys(other.attributes).length
    && names.every(name => one.attributes[name] === other.attributes[name]);
}

function made(node) {
  if (typeof node === "string") return document.createTextNode(node);
  if (node.piece) return element(node.text, node.piece.tokens);
  const root = document.createElement(node.tag);
  Object.entries(node.attributes).forEach(([name, value]) => root.setAttribute(name, value));
  show(root, node.children);
  return root;
}

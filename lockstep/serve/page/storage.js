// What a reload of the page does not lose: values by name, in this tab only. A browser may refuse to store anything.

/** The stored value, or null. */
export function stored(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name));
  } catch {
    return null;
  }
}

/** Stores a value, null to remove it; returns whether there was room for it. */
export function store(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// What all parts of the dashboard use: elements, the time of day, and calls with the API key of this tab.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const timeOfDay = (time) => time.toLocaleTimeString([], { hour12: false });

export function clock(time) {
  return element("time", { datetime: time.toISOString() }, timeOfDay(time));
}

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// The same as fetch, with the API key of this tab. Opens the key dialog when the server requires a key.
export async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { cache: "no-store", ...options, headers });
  if (response.status === 401 && !byId("key-dialog").open) byId("key-dialog").showModal();
  return response;
}

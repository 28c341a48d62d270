// Draws the page of the API from openapi.json, which the server makes from its models.
"use strict";

/** An element with text or children. */
function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function styled(made, ...classes) {
  made.classList.add(...classes);
  return made;
}

/** A text whose `code` stands between backticks, as elements. */
function prose(text) {
  return text.split("`").map((part, place) => (place % 2 ? element("code", part) : part));
}

/** A schema's type in words; names of components are links to their tables. */
function typeOf(schema) {
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    const link = element("a", name);
    link.href = `#${name}`;
    return [link];
  }
  const options = schema.anyOf ?? schema.oneOf;
  if (options) {
    const shown = options.filter((each) => each.type !== "null");
    return shown.flatMap((each, place) => (place ? [" or ", ...typeOf(each)] : typeOf(each)));
  }
  if (schema.enum) return [schema.enum.filter((each) => each !== null).map((each) => JSON.stringify(each)).join(" or ")];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items ?? {})];
  return [[schema.type ?? "any"].flat().join(" or ")];
}

/** The bounds of a value, in words. */
function boundsOf(schema) {
  const names = { minimum: "from", exclusiveMinimum: "above", maximum: "to", minItems: "items from", minLength: "characters from" };
  return Object.entries(names)
    .filter(([name]) => schema[name] !== undefined)
    .map(([name, words]) => `${words} ${schema[name]}`)
    .join(" ");
}

function fieldTable(schema) {
  const table = element("table", element("tr", element("th", "field"), element("th", "type"), element("th", "meaning")));
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const shown = styled(element("code", name), ...(schema.required?.includes(name) ? ["required"] : []));
    const bounds = styled(element("span", ` ${boundsOf(field)}`), "quiet");
    const type = styled(element("span", ...typeOf(field)), "type");
    table.append(element("tr", element("td", shown), element("td", type, bounds), element("td", ...prose(field.description ?? ""))));
  }
  return styled(element("div", table), "table");
}

function operationSection(path, method, operation) {
  const title = element("h2", styled(element("span", method), "method"), " ", element("code", path));
  title.id = operation.operationId;
  const section = element("section", title, element("p", operation.summary));
  for (const parameter of operation.parameters ?? []) {
    const kind = { path: "Part of the path", query: "Parameter", header: "Header" }[parameter.in];
    const type = styled(element("span", ...typeOf(parameter.schema)), "type", "quiet");
    const meaning = prose(parameter.description ?? "");
    section.append(element("p", `${kind} `, element("code", parameter.name), " ", type, ": ", ...meaning));
  }
  const body = operation.requestBody?.content["application/json"]?.schema;
  if (body) section.append(element("p", "Body: ", ...typeOf(body)));
  for (const [media, { schema }] of Object.entries(operation.responses["200"].content)) {
    const meaning = schema.description ? [". ", ...prose(schema.description)] : [];
    section.append(element("p", `Answer (${media}): `, ...typeOf(schema), ...meaning));
  }
  return section;
}

function componentSection(name, schema) {
  const title = element("h2", element("code", name));
  title.id = name;
  return element("section", title, element("p", ...prose(schema.description ?? "")), fieldTable(schema));
}

async function draw() {
  const main = document.querySelector("main");
  const list = element("ul");
  const answer = await fetch("openapi.json");
  const api = await answer.json();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const link = element("a", `${method.toUpperCase()} ${path}`);
      link.href = `#${operation.operationId}`;
      list.append(element("li", link));
      main.append(operationSection(path, method, operation));
    }
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) main.append(componentSection(name, schema));
  const errors = Object.entries(api.paths["/v1/completions"].post.responses).filter(([status]) => status !== "200");
  const rows = errors.map(([status, { description }]) => element("tr", element("td", status), element("td", ...prose(description))));
  main.append(element("section", element("h2", "Errors"), element("table", ...rows)));
  document.querySelector("nav").append(list);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

draw().catch((error) => document.querySelector("main").append(element("p", `openapi.json cannot be read: ${error.message}`)));

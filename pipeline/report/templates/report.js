"use strict";

// The functions that the scripts of all sections share. Texts of rows reach the document by
// textContent alone.
const report = (function () {
  // Characters that a reader cannot see, or that reorder the text around them.
  const HIDDEN =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb]|[\u{e0000}-\u{e0fff}]/u;

  // Return the value of a section's `data`.
  function data(id) {
    return JSON.parse(document.getElementById("data-" + id).textContent);
  }

  // Run the script of a section.
  function section(id, run) {
    run(report, document.getElementById(id));
  }

  // Return an element: make("td", {class: "number"}, "5", otherElement).
  function make(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined)
        node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  // Return an isolated element with a text, its hidden characters as symbols.
  function shown(text, name = "bdi") {
    const node = document.createElement(name);
    node.classList.add("text");
    let plain = "";
    for (const character of text) {
      if (!HIDDEN.test(character)) {
        plain += character;
        continue;
      }
      if (plain) node.append(plain);
      plain = "";
      const code = character.codePointAt(0);
      const hex = "U+" + code.toString(16).toUpperCase().padStart(4, "0");
      const mark = make("span", { class: "hidden-character", title: hex });
      mark.textContent =
        code < 32 ? String.fromCharCode(0x2400 + code) : code === 127 ? "\u2421" : hex;
      node.append(mark);
    }
    if (plain) node.append(plain);
    return node;
  }

  const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

  // Return a number in the form of the tables: 12,345; 1.23; 0.00123.
  function number(value, digits = 3) {
    if (value === null || value === undefined) return "";
    if (Number.isInteger(value) || Math.abs(value) >= 1000) return grouped.format(value);
    if (Math.abs(value) < 1e-3) return value.toExponential(digits - 1);
    return Number(value.toPrecision(digits)).toString();
  }

  // Return a length of time: 340 ms, 12.5 s, 4 min 10 s, 2 h 5 min.
  function duration(seconds) {
    if (seconds === null || seconds === undefined) return "";
    if (seconds === 0) return "0";
    if (seconds < 1) return Number((seconds * 1000).toPrecision(3)) + " ms";
    if (seconds < 60) return Number(seconds.toPrecision(3)) + " s";
    const whole = Math.round(seconds);
    const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
    const [unit, name, part, partName] = units.find(([size]) => whole >= size);
    const rest = Math.floor((whole % unit) / part);
    return Math.floor(whole / unit) + " " + name + (rest ? ` ${rest} ${partName}` : "");
  }

  // Return a note that a text of a row was cut to a number of characters; null if it was not.
  function cutNote(row, field, cut) {
    const length = row.cut?.[field];
    return length === undefined
      ? null
      : make("p", { class: "note" }, `The first ${number(cut)} of ${number(length)} characters.`);
  }

  // Return a text of a row below a title, with the note; null if the row has no such text.
  function textBlock(row, field, title, cut) {
    if (row[field] === undefined) return null;
    const block = make("div", { class: "block" }, make("h4", {}, title));
    block.append(shown(row[field], "pre"), cutNote(row, field, cut) ?? "");
    return block;
  }

  return { data, section, make, shown, number, duration, cutNote, textBlock };
})();

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-printed]")) {
    details.open = false;
    delete details.dataset.printed;
  }
});

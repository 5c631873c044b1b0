// @ts-check
"use strict";
// Elements, numbers and untrusted text. Text from a rollout becomes text nodes and nothing else.

/** @typedef {Node | string | null | undefined | false} Child Strings become text nodes. */
/** @typedef {Record<string, string | number | boolean | null | undefined>} Attributes true: empty; false, null: left out. */

const SVG = "http://www.w3.org/2000/svg";

/** Characters that cannot be seen or that reorder what is around them: controls, bidi marks, zero-width, tags, halves of
 * surrogate pairs. The joiners U+200C and U+200D are part of scripts and emoji and stay. */
const INVISIBLE =
  /\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\p{Cs}\u{e0000}-\u{e007f}]/u;
const INVISIBLE_ALL = new RegExp(INVISIBLE, "gu");

/**
 * @param {Element} node
 * @param {Attributes} attributes
 * @param {Child[]} children
 */
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, String(value));
  }
  node.append(...present(children));
}

/** @param {Child[]} children @returns {(Node | string)[]} */
function present(children) {
  return children.filter((child) => child instanceof Node || typeof child === "string");
}

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Attributes} [attributes]
 * @param {...Child} children
 */
function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  fill(node, attributes, children);
  return node;
}

/**
 * @template {keyof SVGElementTagNameMap} T
 * @param {T} tag
 * @param {Attributes} [attributes]
 * @param {...Child} children
 */
function svg(tag, attributes = {}, ...children) {
  const node = /** @type {SVGElementTagNameMap[T]} */ (document.createElementNS(SVG, tag));
  fill(node, attributes, children);
  return node;
}

/**
 * The element of the page with this id.
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 */
function byId(id) {
  return /** @type {T} */ (document.getElementById(id));
}

/** @param {string} character */
function codeName(character) {
  return `U+${/** @type {number} */ (character.codePointAt(0)).toString(16).toUpperCase().padStart(4, "0")}`;
}

/**
 * Untrusted text for places that hold nothing but text (options, labels): invisible characters are spelled out.
 * @param {string} text
 */
function spelled(text) {
  return text.replace(INVISIBLE_ALL, (character) => `⟨${codeName(character)}⟩`);
}

/** @param {string} text @param {number} size */
function cut(text, size) {
  return text.length > size ? `${text.slice(0, size).replace(/[\ud800-\udbff]$/, "")}…` : text;
}

/**
 * Untrusted text with invisible characters as visible marks, and the accepted answer and what is searched for highlighted.
 * @param {string} text
 * @param {RegExp | null} [search]
 * @param {RegExp | null} [answer]
 */
function shown(text, search = null, answer = null) {
  const sought = [answer, search].map((one) => (one ? `(${one.source})` : "(?!)()"));
  const pattern = new RegExp(`${INVISIBLE.source}|${sought.join("|")}`, "giu");
  const fragment = document.createDocumentFragment();
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    fragment.append(text.slice(at, match.index));
    const [found, isAnswer] = match;
    if (INVISIBLE.test(found)) fragment.append(html("span", { class: "invisible" }, codeName(found)));
    else fragment.append(html("mark", { class: isAnswer ? "answer" : null }, found));
    at = match.index + found.length;
  }
  fragment.append(text.slice(at));
  return fragment;
}

/**
 * Untrusted text of any length: the beginning, and a button that shows more, a piece at a time.
 * @param {string} text
 * @param {{ limit?: number, search?: RegExp | null, answer?: RegExp | null, label?: string }} [options]
 */
function longText(text, { limit = 600, search = null, answer = null, label = "text" } = {}) {
  const PIECE = 20_000;
  const box = html("div", { class: "text", dir: "auto" });
  let at = 0;
  /** @param {number} size */
  const extend = (size) => {
    let end = text.length - at < size * 1.2 ? text.length : at + size; // no button for a few words
    if (/[\ud800-\udbff]/.test(text.charAt(end - 1))) end++; // not through a surrogate pair
    box.append(shown(text.slice(at, end), search, answer));
    at = end;
    if (at >= text.length) return;
    const left = text.length - at;
    const hits = [answer?.test(text.slice(at)) && "the answer", search?.test(text.slice(at)) && "a match"].filter(Boolean);
    const hit = hits.length ? `, ${hits.join(" and ")} among them` : "";
    const more = html("button", { type: "button", class: "more" }, `Show more (${count(left)} characters left${hit})`);
    more.setAttribute("aria-label", `Show more of the ${label}, ${count(left)} characters left${hit}`);
    more.addEventListener("click", () => {
      const first = html("span", { tabindex: -1 });
      more.replaceWith(first);
      extend(PIECE);
      first.focus({ preventScroll: true });
    });
    box.append(more);
  };
  extend(limit);
  return box;
}

/**
 * What finds `words` in texts, whatever the case; null for nothing to find.
 * @param {string} words
 */
function searchFor(words) {
  return words ? new RegExp(words.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "iu") : null;
}

/** Of scripts in which spaces mark no words. */
const ALONE = "[\\p{sc=Han}\\p{sc=Hira}\\p{sc=Kana}\\p{sc=Hang}\\p{sc=Thai}\\p{sc=Lao}\\p{sc=Mymr}\\p{sc=Khmr}]";
const IN_WORD = `(?!${ALONE})[\\p{L}\\p{N}]`;

/**
 * What finds accepted answers in texts as whole words, as they stand there; null for none.
 * @param {(string | null | undefined)[]} answers
 */
function answersFor(answers) {
  const [begins, ends] = [new RegExp(`^${IN_WORD}`, "u"), new RegExp(`${IN_WORD}$`, "u")];
  const patterns = [...new Set(answers)].map((answer) => {
    const quoted = searchFor(answer ?? "")?.source;
    return quoted && `${begins.test(answer ?? "") ? `(?<!${IN_WORD})` : ""}${quoted}${ends.test(answer ?? "") ? `(?!${IN_WORD})` : ""}`;
  });
  const sought = patterns.filter(Boolean);
  return sought.length ? new RegExp(sought.join("|"), "iu") : null;
}

/** @param {number | null | undefined} value */
function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/**
 * @param {number | null | undefined} value
 * @param {number} [digits]
 */
function decimal(value, digits = 2) {
  return isNumber(value) ? /** @type {number} */ (value).toFixed(digits).replace(/^-(?=0?\.?0*$)/, "").replace("-", "−") : "–";
}

/**
 * With its sign, as advantages are shown.
 * @param {number | null | undefined} value
 */
function signed(value) {
  const text = decimal(value);
  return /^[\d.]*[1-9]/.test(text) ? `+${text}` : text;
}

/** @param {number | null | undefined} value */
function count(value) {
  return isNumber(value) ? /** @type {number} */ (value).toLocaleString("en") : "–";
}

/**
 * @param {number} value
 * @param {string} one
 * @param {string} [many]
 */
function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** @param {string} text of a number @returns {string} without a last decimal of 0 */
function trimmed(text) {
  return text.replace(/\.0$/, "");
}

/**
 * A share in whole percent; below 1 % and above 99 % with one decimal, so that what is not 0 or 1 never looks like it.
 * The rules of `verl_tapo/audit/units.py`.
 * @param {number | null | undefined} value
 */
function percent(value) {
  if (!isNumber(value)) return "–";
  const share = /** @type {number} */ (value) * 100;
  const text = trimmed(share.toFixed((share > 0 && share < 1) || (share > 99 && share < 100) ? 1 : 0));
  if (text === "0" && share > 0) return "<0.1 %";
  return text === "100" && share < 100 ? ">99.9 %" : `${text} %`;
}

/**
 * A difference of two shares in percentage points, with its sign; below 1 with one decimal.
 * @param {number | null | undefined} value
 */
function points(value) {
  if (!isNumber(value)) return "–";
  const difference = Math.abs(/** @type {number} */ (value) * 100);
  const text = trimmed(difference.toFixed(difference < 1 ? 1 : 0));
  const sign = text === "0" ? "" : /** @type {number} */ (value) > 0 ? "+" : "−";
  return `${sign}${text} ${text === "1" ? "point" : "points"}`;
}

/**
 * @param {number | null | undefined} part
 * @param {number | null | undefined} whole
 * @returns {number | null} null where there is no whole
 */
function share(part, whole) {
  return isNumber(part) && whole ? /** @type {number} */ (part) / whole : null;
}

/** @param {number} bytes */
function fileSize(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

const MOST_ROWS = 1000;

/** Marks tables that are cut off at a side, so that the page can say so. */
const watchWidths = new ResizeObserver((changes) => {
  for (const { target } of changes) target.parentElement?.classList.toggle("cut-off", target.scrollWidth > target.clientWidth);
});

/**
 * A table that scrolls on its own where it is too wide, and says so; what is in the first column heads its row.
 * @param {string} caption
 * @param {string[]} columns
 * @param {(string | number)[][]} rows
 * @param {(row: number) => boolean} [isCurrent] marks a row
 */
function table(caption, columns, rows, isCurrent = () => false) {
  if (rows.length > MOST_ROWS) caption += ` (the first ${count(MOST_ROWS)} of ${count(rows.length)} rows)`;
  const box = html(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    html(
      "table",
      {},
      html("caption", {}, caption),
      html("thead", {}, html("tr", {}, ...columns.map((name) => html("th", { scope: "col" }, name)))),
      html(
        "tbody",
        {},
        ...rows.slice(0, MOST_ROWS).map(([first, ...rest], index) =>
          html(
            "tr",
            { "aria-current": isCurrent(index) && "true" },
            html("th", { scope: "row" }, typeof first === "string" ? shown(first) : count(first)),
            ...rest.map((cell) => html("td", {}, String(cell))),
          ),
        ),
      ),
    ),
  );
  watchWidths.observe(box);
  return html("div", {}, html("p", { class: "more-columns" }, "More columns at the side →"), box);
}

/**
 * A part that is made when it is first opened.
 * @param {string} summary
 * @param {() => Node} content
 */
function folded(summary, content) {
  const details = html("details", {}, html("summary", {}, summary));
  details.addEventListener("toggle", () => details.append(content()), { once: true });
  return details;
}

// @ts-check
"use strict";
// Reads the data, draws the page, listens.

/**
 * The parsed blocks of one kind, which leave the page's tree: their text would be held twice.
 * @param {string} kind
 */
function takeData(kind) {
  return [...document.querySelectorAll(`script[data-kind="${kind}"]`)].map((block) => {
    block.remove();
    return JSON.parse(block.textContent ?? "");
  });
}

/**
 * @param {Summary} summary
 * @param {Group[]} groups
 * @param {number} bytes
 */
function drawFrame(summary, groups, bytes) {
  const { settings, problems, skipped, totals } = summary;
  byId("settings").append(table("Settings", ["Setting", "Value"], Object.entries(settings).map(([name, value]) => [name, spelled(plain(value))])));
  const box = byId("problems");
  box.hidden = !problems.length && !skipped;
  /** @type {HTMLElement} */ (box.querySelector("summary")).textContent = `${counted(skipped, "line")} skipped, ${counted(problems.length, "problem")}`;
  box.append(table("What could not be read", ["File", "Line", "Reason"], problems.map(({ file, line, reason }) => [file, count(line), spelled(cut(reason, 400))])));
  const trajectories = groups.reduce((sum, group) => sum + group.trajectories.length, 0);
  byId("colophon").textContent =
    `This file: ${fileSize(bytes)}, with ${counted(groups.length, "prompt group")} and ${counted(trajectories, "rollout")} of ` +
    `${count(totals.trajectories)} to read. It loads nothing from the network.`;
}

/**
 * @param {string} id
 * @param {string} any
 * @param {[string, string][]} options value and text
 */
function offer(id, any, options) {
  byId(id).append(html("option", { value: "" }, any), ...options.map(([value, text]) => html("option", { value }, text)));
}

/**
 * @param {Browser} browser
 * @param {Group[]} groups
 */
function connectFilters(browser, groups) {
  const steps = [...new Set(groups.map(({ step }) => step))].sort((a, b) => a - b);
  /** @type {Map<string, number>} */
  const calls = new Map();
  for (const { trajectories } of groups) for (const trajectory of trajectories) for (const { tool } of trajectory.calls) calls.set(tool, (calls.get(tool) ?? 0) + 1);
  const tools = [...calls.keys()].sort((a, b) => (calls.get(b) ?? 0) - (calls.get(a) ?? 0)).slice(0, 200); // a policy may invent any number
  offer("filter-step", "any", steps.map((step) => [String(step), String(step)]));
  offer("filter-tool", "any", tools.map((tool) => [tool, cut(spelled(tool), 60)]));
  offer("filter-gate", "any", [...Object.entries(GATES), ["lucky", "with lucky witnesses"], ["inexact", "only similar to a witness"]]);
  offer("filter-role", "any", Object.entries(ROLES));
  offer("filter-success", "any", [["yes", "right"], ["no", "wrong"]]);
  offer("filter-grounding", "any", Object.entries(GROUNDINGS));

  const form = /** @type {HTMLFormElement} */ (byId("filters"));
  const value = (/** @type {string} */ id) => /** @type {HTMLInputElement | HTMLSelectElement} */ (byId(id)).value;
  const apply = () => {
    browser.apply({
      search: searchFor(value("filter-text").trim()),
      step: value("filter-step"),
      tool: value("filter-tool"),
      gate: value("filter-gate"),
      role: value("filter-role"),
      success: value("filter-success"),
      grounding: value("filter-grounding"),
    });
    browser.reopen();
  };
  let waiting = 0;
  form.addEventListener("input", ({ target }) => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, target === byId("filter-text") ? 200 : 0);
  });
  form.addEventListener("reset", () => setTimeout(apply)); // after the fields are empty
  form.addEventListener("submit", (event) => event.preventDefault());
  return apply;
}

/** @param {Browser} browser */
function connectKeyboard(browser) {
  const help = /** @type {HTMLDialogElement} */ (byId("help"));
  const search = /** @type {HTMLInputElement} */ (byId("filter-text"));
  const shortcuts = /** @type {HTMLInputElement} */ (byId("shortcuts"));
  byId("help-button").addEventListener("click", () => help.showModal());
  /** @type {Record<string, () => void>} */
  const keys = {
    j: () => browser.moveGroup(1),
    k: () => browser.moveGroup(-1),
    n: () => browser.moveCall(1),
    p: () => browser.moveCall(-1),
    w: () => browser.moveToWitness(),
    "/": () => search.focus(),
    "?": () => help.showModal(),
  };
  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || help.open || !(target instanceof Element)) return;
    if (target === search && key === "Escape") {
      search.value = "";
      search.dispatchEvent(new Event("input", { bubbles: true }));
      search.blur();
    }
    if (target.closest("#group-list") && (key === "ArrowDown" || key === "ArrowUp")) {
      event.preventDefault();
      browser.moveGroup(key === "ArrowDown" ? 1 : -1);
      const current = document.querySelector("#group-list [aria-current]");
      if (current instanceof HTMLElement) current.focus();
      return;
    }
    const action = keys[key];
    if (!action || !shortcuts.checked || target.closest("input, select, textarea")) return;
    event.preventDefault();
    action();
  });
}

{
  /** @type {Summary} */
  const summary = takeData("summary")[0];
  /** @type {Group[]} */
  const groups = takeData("group");
  for (const part of document.querySelectorAll("[data-scripted]")) part.removeAttribute("hidden");
  drawFrame(summary, groups, takeData("bytes")[0]);
  drawPlots(summary);
  drawTools(summary, takeData("columns")[0]);
  drawSweeps(summary);
  const browser = new Browser(groups, summary.settings);
  connectFilters(browser, groups)();
  connectKeyboard(browser);
  const follow = () => {
    const place = placeOf(location.hash);
    if (place) browser.open(place, true);
  };
  addEventListener("hashchange", follow);
  follow();
}

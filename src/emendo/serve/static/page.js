"use strict";
// Sends the forms of the page and puts the server's HTML in its places. A table of attributes:
//   form data-fragment, data-into   POST the form as JSON, and show the HTML that comes back
//   form data-post, data-done       POST the form as JSON, say that it is done, and show the ledger anew
//   button data-call, data-url      the same for a button
//   details data-load               load the content when it is opened
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const open = document.body.dataset.open === "yes";
  let token = open ? "" : sessionStorage.getItem("emendo-token") || "";
  let limit = 50;

  async function call(method, url, body) {
    const headers = {};
    if (token) headers.Authorization = `Bearer ${token}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const text = body === undefined ? undefined : JSON.stringify(body);
    let reply;
    try {
      reply = await fetch(url, { method, headers, body: text, cache: "no-store", credentials: "omit" });
    } catch {
      throw new Error("The server cannot be reached.");
    }
    if (reply.ok) return reply;
    const said = await reply.json().catch(() => ({}));
    const found = said.error || {};
    const refused = found.code === "edit_refused";
    const why = refused && `The guard refuses this edit: ${found.problems.join("; ")}. Nothing was applied.`;
    throw Object.assign(new Error(why || found.message || `The server answers ${reply.status}.`), { refused });
  }

  async function show(url, into, body) {
    const reply = await call(body === undefined ? "GET" : "POST", url, body);
    into.innerHTML = await reply.text(); // the server escapes all data in it
  }

  function fields(form, { trying = false } = {}) {
    const values = {};
    for (const field of form.elements) {
      if (!field.name) continue;
      if (field.type === "checkbox") values[field.name] = field.checked;
      else if ("list" in field.dataset) {
        if (field.dataset.list === "try" && !trying) continue;
        values[field.name] = field.value.split("\n").map((line) => line.trim()).filter(Boolean);
      } else if (field.type === "number") values[field.name] = Number(field.value);
      else if (field.value.trim()) values[field.name] = field.value;
    }
    return values;
  }

  function say(area, text, kind = "") {
    const place = $(".message", area.closest("form, .tools, section")) || $(".message");
    place.textContent = text;
    place.className = `message ${kind}`;
  }

  // Runs work once at a time for an area, whose buttons wait meanwhile.
  async function busy(area, word, work) {
    if (area.ariaBusy === "true") return;
    const buttons = [...area.querySelectorAll("button")], focused = document.activeElement;
    area.ariaBusy = "true";
    document.querySelectorAll(".message.good, .message.bad").forEach((old) => (old.textContent = ""));
    buttons.forEach((button) => (button.disabled = true));
    say(area, word);
    try {
      const done = await work();
      say(area, done || "", "good");
    } catch (error) {
      say(area, error.message, "bad");
      const force = $("[data-force]", area);
      if (force) force.hidden = !error.refused;
    } finally {
      area.ariaBusy = "false";
      buttons.forEach((button) => (button.disabled = false));
      if (document.activeElement === document.body) focused.focus(); // a button that is disabled loses it
    }
  }

  const edits = () => {
    const query = new URLSearchParams({ ...fields($("#search-form")), limit });
    return show(`page/edits?${query}`, $("#edits"));
  };

  async function refresh() {
    const model = $("#model"), chosen = model.value;
    await Promise.all([edits(), show("page/state", $("#state")), show(model.dataset.refresh, model)]);
    if ([...model.options].some((option) => option.value === chosen)) model.value = chosen;
  }

  async function post(form, more = {}) {
    const reply = await call("POST", form.dataset.post, { ...fields(form), ...more });
    const step = await reply.json();
    if ("clear" in form.dataset) form.reset();
    const force = $("[data-force]", form);
    if (force) force.hidden = true;
    await refresh();
    return form.dataset.done.replace("#", step.id);
  }

  document.addEventListener("submit", (event) => {
    const form = event.target;
    event.preventDefault();
    if (form.id === "token-form") {
      token = $("#token").value.trim();
      busy(form, "Checking…", async () => {
        await refresh();
        sessionStorage.setItem("emendo-token", token);
        return "The token is used until this tab is closed.";
      });
    } else if (form.id === "search-form") edits().catch((error) => say(form, error.message, "bad"));
    else if (form.dataset.fragment)
      busy(form, "Asking…", () => show(form.dataset.fragment, $(form.dataset.into), fields(form)));
    else if (form.dataset.post) busy(form, "Working…", () => post(form));
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const data = button.dataset, form = button.form;
    if (data.try) {
      if (form.reportValidity())
        busy(form, "Trying…", () => show(data.try, $(data.into), fields(form, { trying: true })));
    } else if ("force" in data) busy(form, "Working…", () => post(form, { force: true }));
    else if (data.call)
      busy(button.closest("section"), "Working…", async () => {
        await call(data.call, data.url, data.body && JSON.parse(data.body));
        await refresh();
        $("#search").focus();
        return data.done;
      });
    else if (data.more) {
      limit = Number(data.more);
      edits().catch((error) => say($("#search-form"), error.message, "bad"));
    } else if (data.correct !== undefined) {
      $("#edit-prompt").value = data.correct;
      $("#correct").scrollIntoView();
      $("#target").focus();
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form) event.target.form.requestSubmit();
  });

  document.addEventListener(
    "toggle",
    (event) => {
      const details = event.target;
      if (!details.open || !details.dataset.load) return;
      const place = $("div", details);
      show(details.dataset.load, place).catch((error) => (place.textContent = error.message));
      delete details.dataset.load;
    },
    true,
  );

  let waiting;
  $("#search-form").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => edits().catch((error) => say($("#search-form"), error.message, "bad")), 200);
  });

  if (!open && token) refresh().catch((error) => say($("#token-form"), error.message, "bad"));
})();

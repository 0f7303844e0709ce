"use strict";
// The token goes into the body of one request and comes back as a cookie that no script can read. A link may carry it behind the #, which no server sees.
const form = document.getElementById("login"), field = document.getElementById("token"), notice = document.getElementById("notice");

async function login() {
  let reply = {}, good = false;
  try {
    const response = await fetch("/researcher/login", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({token: field.value})});
    good = response.ok;
    reply = await response.json();
  } catch { reply = {text: "The server does not answer. Please try again."}; }
  if (good) { location.replace("/researcher/"); return; }
  notice.textContent = reply.text;
  notice.hidden = false;
  field.select();
}

form.addEventListener("submit", event => { event.preventDefault(); login(); });
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  history.replaceState(null, "", location.pathname);
  field.value = given;
  login();
}

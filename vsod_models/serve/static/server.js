// Requests to the server; errors are its own sentences.

export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    lost(true);
    throw new Error("The server does not answer. Is vsod serve still running?");
  }
  lost(false);
  if (answer.ok) return answer;
  const text = await answer.text();
  let told = text;
  let details = {};
  try {
    details = JSON.parse(text);
    told = details.error ?? text;
  } catch { /* plain text */ }
  const error = new Error(told || `The server refused (${answer.status}).`);
  error.status = answer.status;
  error.details = details;
  throw error;
}

export async function json(address, body, method = "POST") {
  const options = body === undefined ? {} : {
    method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  };
  return (await ask(address, options)).json();
}

export const byId = (id) => document.getElementById(id);

function lost(is) {
  byId("connection").textContent = is ? "No connection" : "";
}

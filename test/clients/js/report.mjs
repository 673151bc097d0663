// Reports the server's answers to requests about delayed events and memberships on standard output, one JSON object a line:
//
//   {"request": "schedule", "status": 200, "delay": 8000, "delayId": "…", "stateKey": "…"}
//   {"request": "join", "status": 200}         so is "leave", which is the same request with an empty content
//   {"request": "restart", "status": 429, "errcode": "M_LIMIT_EXCEEDED", "retryAfter": 2}

export const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");

// describe returns what is reported of a request, or undefined.
function describe(input, init) {
  const { pathname, searchParams } = new URL(input);
  const delay = searchParams.get("org.matrix.msc4140.delay");
  if (delay) return { request: "schedule", delay: Number(delay), stateKey: decodeURIComponent(pathname.split("/").at(-1)) };
  if (init?.method === "PUT" && pathname.includes("/state/org.matrix.msc3401.call.member/")) {
    return { request: init.body === "{}" ? "leave" : "join" };
  }
  const action = pathname.match(/\/delayed_events\/[^/]+\/(\w+)$/)?.[1];
  return action && { request: action };
}

// fetchFn is fetch, and reports answers.
export async function fetchFn(input, init) {
  const request = describe(input, init);
  const response = await fetch(input, init);
  if (request) {
    const { delay_id: delayId, errcode } = await response.clone().json();
    const retryAfter = response.headers.get("Retry-After");
    say({ ...request, status: response.status, delayId, errcode, retryAfter: retryAfter ? Number(retryAfter) : undefined });
  }
  return response;
}

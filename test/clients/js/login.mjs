import { createClient } from "matrix-js-sdk";

// login returns a client of the user, with a new device. fetchFn makes its requests; without it they are made with fetch.
export async function login({ baseUrl, user, password }, fetchFn) {
  const account = await createClient({ baseUrl }).loginRequest({
    type: "m.login.password",
    identifier: { type: "m.id.user", user },
    password,
  });
  return createClient({
    baseUrl,
    fetchFn,
    accessToken: account.access_token,
    userId: account.user_id,
    deviceId: account.device_id,
  });
}

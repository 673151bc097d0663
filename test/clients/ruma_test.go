//go:build all

package clients

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// These are the requests of the Rust SDK, byte for byte. Its paths have characters that other clients encode.
const (
	rustState = `PUT /_matrix/client/v3/rooms/%s/state/%s/%s?org.matrix.msc4140.delay=3600000 HTTP/1.1
content-type: application/json
authorization: Bearer %s
user-agent: matrix-rust-sdk
accept: */*
host: HOST
content-length: 2

{}`
	rustMessage = `PUT /_matrix/client/v3/rooms/%s/send/%s/%s?org.matrix.msc4140.delay=3600000 HTTP/1.1
content-type: application/json
authorization: Bearer %s
user-agent: matrix-rust-sdk
accept: */*
host: HOST
content-length: 2

{}`
	rustUpdate = `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/%s HTTP/1.1
content-type: application/json
authorization: Bearer %s
user-agent: matrix-rust-sdk
accept: */*
host: HOST
content-length: %d

%s`
	rustLookUp = `GET /_matrix/client/unstable/org.matrix.msc4140/delayed_events/%s HTTP/1.1
authorization: Bearer %s
user-agent: matrix-rust-sdk
accept: */*
host: HOST

`
)

// rust is a user of the Rust SDK in a room.
type rust struct {
	*homeserver.Client
	server *homeserver.Server
	roomID string
}

func newRust(t *testing.T) rust {
	t.Helper()
	server := start(t, homeserver.Config{})
	alice := register(t, server, "alice")
	roomID, err := alice.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	return rust{alice, server, roomID}
}

// schedule makes a request that schedules an event, and returns the delay ID.
func (r rust) schedule(t *testing.T, request, eventType, key string) string {
	t.Helper()
	res := write(t, r.server, fmt.Sprintf(request, r.roomID, eventType, key, r.Token))
	require.Equal(t, http.StatusOK, res.Code, res)
	require.Empty(t, res.Get("event_id").Str, "sent at once")
	return res.Get("delay_id").Str
}

// update has the action in its body, and the user's token.
func (r rust) update(t *testing.T, delayID, action string) homeserver.Response {
	t.Helper()
	body := fmt.Sprintf(`{"action":%q}`, action)
	return write(t, r.server, fmt.Sprintf(rustUpdate, delayID, r.Token, len(body), body))
}

func (r rust) look(t *testing.T, delayID string) homeserver.Response {
	t.Helper()
	res := write(t, r.server, fmt.Sprintf(rustLookUp, delayID, r.Token))
	require.Equal(t, http.StatusOK, res.Code, res)
	return res
}

// The Rust SDK schedules with the delay in the query, acts with the action in the body, and looks up the older names of fields.
func TestRustSDK(t *testing.T) {
	t.Parallel()
	alice := newRust(t)
	stateKey := "_" + alice.UserID + "_DEVICE_m.call"

	sent := alice.schedule(t, rustState, memberType, stateKey)
	looked := alice.look(t, sent)
	require.EqualValues(t, 3600000, looked.Get("delay").Int())
	require.Positive(t, looked.Get("running_since").Int())
	require.Equal(t, stateKey, looked.Get("state_key").Str)
	require.Equal(t, "{}", looked.Get("content").Raw)
	require.False(t, looked.Get("finalised_ts").Exists())
	answers(t, alice.update(t, sent, "restart"))
	require.GreaterOrEqual(t, alice.look(t, sent).Get("running_since").Int(), looked.Get("running_since").Int())
	answers(t, alice.update(t, sent, "send"))
	do(t, alice.Client, http.MethodGet, homeserver.StatePath(alice.roomID, memberType, stateKey), nil)
	looked = alice.look(t, sent)
	require.Positive(t, looked.Get("finalised_ts").Int())
	require.NotEmpty(t, looked.Get("event_id").Str)
	answers(t, alice.update(t, sent, "send"))
	refuses(t, alice.update(t, sent, "restart"), 404, "M_NOT_FOUND")
	refuses(t, alice.update(t, sent, "cancel"), 404, "M_NOT_FOUND")

	cancelled := alice.schedule(t, rustMessage, "m.room.message", "txn")
	require.Equal(t, cancelled, alice.schedule(t, rustMessage, "m.room.message", "txn"), "the transaction ID is the same")
	require.False(t, alice.look(t, cancelled).Get("state_key").Exists())
	answers(t, alice.update(t, cancelled, "cancel"))
	answers(t, alice.update(t, cancelled, "cancel"))
	looked = alice.look(t, cancelled)
	require.Positive(t, looked.Get("finalised_ts").Int())
	require.False(t, looked.Get("event_id").Exists())
	require.False(t, looked.Get("error").Exists())
	for _, action := range []string{"send", "restart"} {
		refuses(t, alice.update(t, cancelled, action), 404, "M_NOT_FOUND")
	}
	refuses(t, alice.update(t, "unknown", "restart"), 404, "M_NOT_FOUND")

	// A token that is no longer valid does not matter, because the delay ID is the authority.
	kept := alice.schedule(t, rustState, memberType, stateKey)
	alice.Token = "expired"
	answers(t, alice.update(t, kept, "restart"))
}

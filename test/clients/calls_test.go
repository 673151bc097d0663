//go:build all

package clients

import (
	"bufio"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// sdkClient is matrix-js-sdk's client of a user, see js/calls.mjs.
type sdkClient struct {
	*script
	lines  *bufio.Scanner
	roomID string
}

// newSDKClient starts a client, whose user is in a room.
func newSDKClient(t *testing.T) *sdkClient {
	t.Helper()
	t.Parallel()
	withSDK(t)
	server := start(t, homeserver.Config{})
	alice := register(t, server, "alice")
	roomID, err := alice.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	c := &sdkClient{roomID: roomID}
	c.script = run(t, "calls.mjs", alice, nil, func() {})
	c.lines = bufio.NewScanner(c.stdout)
	return c
}

// call calls a function of the client, and returns its result.
func (c *sdkClient) call(t *testing.T, name string, args ...any) gjson.Result {
	t.Helper()
	data, err := json.Marshal(append([]any{name}, args...))
	require.NoError(t, err)
	_, err = fmt.Fprintf(c.stdin, "%s\n", data)
	require.NoError(t, err)
	require.True(t, c.lines.Scan(), "the script has ended")
	return gjson.Parse(c.lines.Text())
}

// schedule schedules an event by a call, and returns its delay ID.
func (c *sdkClient) schedule(t *testing.T, name string, args ...any) string {
	t.Helper()
	res := c.call(t, name, append([]any{c.roomID, homeserver.JSON{"delay": 3600000}}, args...)...)
	require.NotEmpty(t, res.Get("delay_id").Str, res.Raw)
	return res.Get("delay_id").Str
}

func (c *sdkClient) scheduleState(t *testing.T) string {
	t.Helper()
	return c.schedule(t, "_unstable_sendDelayedStateEvent", memberType, homeserver.JSON{"text": "state"}, "key")
}

// All calls of matrix-js-sdk about delayed events, except for the look-up of one.
func TestSDKCalls(t *testing.T) {
	c := newSDKClient(t)
	state := c.scheduleState(t)
	message := c.schedule(t, "_unstable_sendDelayedEvent", nil, "org.example.delayed", homeserver.JSON{"text": "message"}, "txn")

	for _, args := range [][]any{nil, {"scheduled"}, {nil, []string{state, message}}} {
		list := c.call(t, "_unstable_getDelayedEvents", args...).Get("delayed_events").Array()
		require.Len(t, list, 2)
		for i, want := range []struct{ delayID, text string }{{state, "state"}, {message, "message"}} {
			require.Equal(t, want.delayID, list[i].Get("delay_id").Str, "the order is that of the due times")
			require.Equal(t, want.text, list[i].Get("content.text").Str)
			require.Equal(t, c.roomID, list[i].Get("room_id").Str)
			require.EqualValues(t, 3600000, list[i].Get("delay").Int())
			require.Positive(t, list[i].Get("running_since").Int())
		}
	}

	done := func(name, delayID string, action ...any) {
		t.Helper()
		require.Equal(t, "{}", c.call(t, name, append([]any{delayID}, action...)...).Raw)
	}
	gone := func(name, delayID string, action ...any) {
		t.Helper()
		res := c.call(t, name, append([]any{delayID}, action...)...)
		require.Equal(t, "404 M_NOT_FOUND", fmt.Sprint(res.Get("status").Int(), " ", res.Get("errcode").Str), res.Raw)
	}
	const restart, send, cancel, update = "_unstable_restartScheduledDelayedEvent", "_unstable_sendScheduledDelayedEvent",
		"_unstable_cancelScheduledDelayedEvent", "_unstable_updateDelayedEvent"
	done(restart, state)
	done(update, state, "restart")
	done(send, state)
	done(send, state)
	done(update, state, "send")
	gone(restart, state)
	gone(update, state, "restart")
	gone(cancel, state)
	done(cancel, message)
	done(cancel, message)
	gone(send, message)
	gone(restart, message)
	gone(restart, "unknown")
	require.Empty(t, c.call(t, "_unstable_getDelayedEvents").Get("delayed_events").Array())
	require.Equal(t, "state", c.call(t, "getStateEvent", c.roomID, memberType, "key").Get("text").Str)
}

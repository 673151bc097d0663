//go:build all

package clients

import (
	"fmt"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// matrix-js-sdk reads what became of a delayed event from the names that MSC4140 was merged with.
func TestSDKLooksUp(t *testing.T) {
	c := newSDKClient(t)
	const look = "_unstable_getDelayedEvent"
	before := time.Now().Truncate(time.Millisecond)
	state := c.scheduleState(t)
	res := c.call(t, look, state)
	require.Equal(t, state, res.Get("delay_id").Str, res.Raw)
	require.EqualValues(t, 3600000, res.Get("delay_ms").Int())
	require.WithinRange(t, time.UnixMilli(res.Get("delayed_since_ts").Int()), before, time.Now(), res.Raw)
	require.False(t, res.Get("finalised").Exists(), res.Raw)

	require.Equal(t, "{}", c.call(t, "_unstable_sendScheduledDelayedEvent", state).Raw)
	res = c.call(t, look, state)
	require.WithinRange(t, time.UnixMilli(res.Get("finalised.finalised_ts").Int()), before, time.Now(), res.Raw)
	require.NotEmpty(t, res.Get("finalised.event_id").Str, res.Raw)

	cancelled := c.scheduleState(t)
	require.Equal(t, "{}", c.call(t, "_unstable_cancelScheduledDelayedEvent", cancelled).Raw)
	res = c.call(t, look, cancelled)
	require.Positive(t, res.Get("finalised.finalised_ts").Int(), res.Raw)
	require.False(t, res.Get("finalised.event_id").Exists(), res.Raw)
	require.False(t, res.Get("finalised.error").Exists(), res.Raw)
}

// A client of the merged text, which the clients of today turn into.
func TestMergedText(t *testing.T) {
	t.Parallel()
	server := start(t, homeserver.Config{})
	alice, bob := register(t, server, "alice"), register(t, server, "bob")
	roomID, err := alice.CreateRoom(t.Context(), homeserver.JSON{"power_level_content_override": homeserver.JSON{
		"events": homeserver.JSON{memberType: 0},
	}})
	require.NoError(t, err)
	require.NoError(t, bob.Join(t.Context(), roomID))

	const v1, v3, unstable = "/_matrix/client/v1", "/_matrix/client/v3", "/_matrix/client/unstable/org.matrix.msc4140"
	request := func(t *testing.T, c *homeserver.Client, method, path string, body any) homeserver.Response {
		t.Helper()
		res, err := c.Do(t.Context(), method, path, body)
		require.NoError(t, err)
		return res
	}
	dedicated := func(prefix string) string {
		return fmt.Sprintf("%s/rooms/%s/delayed_event/%s/txn", prefix, url.PathEscape(roomID), memberType)
	}
	tooLong := homeserver.JSON{"delay_ms": 86400001, "state_key": "key", "content": homeserver.JSON{}}

	t.Run("1: the delay is too long", func(t *testing.T) {
		refuses(t, request(t, alice, http.MethodPut, dedicated(v3), tooLong), 400, "M_DELAY_TOO_LARGE")
		res := request(t, alice, http.MethodPut, dedicated(unstable), tooLong)
		refuses(t, res, 400, "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE")
		require.EqualValues(t, 86400000, res.Get(`org\.matrix\.msc4140\.max_delay`).Int(), res)
	})
	t.Run("2 and 3: the names of a look-up", func(t *testing.T) {
		delayID := later(t, alice, roomID, "looked up", "text")
		names := func() (names []string) {
			do(t, alice, http.MethodGet, v1+"/delayed_events/"+delayID, nil).Get("@this").ForEach(func(name, _ gjson.Result) bool {
				names = append(names, name.Str)
				return true
			})
			return names
		}
		all := []string{"delay_id", "room_id", "type", "state_key", "delay_ms", "delayed_since_ts", "content"}
		require.ElementsMatch(t, all, names())
		do(t, alice, http.MethodPost, v1+"/delayed_events/"+delayID+"/send", nil)
		require.ElementsMatch(t, append(all, "finalised"), names())
	})
	t.Run("4: there is no list", func(t *testing.T) {
		refuses(t, request(t, alice, http.MethodGet, v1+"/delayed_events", nil), 404, "M_UNRECOGNIZED")
	})
	t.Run("5: an error is a cancellation", func(t *testing.T) {
		roomID, err := alice.CreateRoom(t.Context(), nil)
		require.NoError(t, err)
		require.NoError(t, bob.Join(t.Context(), roomID))
		path := fmt.Sprintf("%s?org.matrix.msc4140.delay=%d000", homeserver.SendPath(roomID, "m.room.message"), patience.Life(3))
		delayID := do(t, bob, http.MethodPut, path, homeserver.JSON{"body": "later"}).Get("delay_id").Str
		do(t, bob, http.MethodPost, v3+"/rooms/"+url.PathEscape(roomID)+"/leave", homeserver.JSON{})
		for deadline := time.Now().Add(soon); len(scheduled(t, bob)) > 0; time.Sleep(500 * time.Millisecond) { // look-ups are limited
			require.Less(t, time.Now(), deadline, "the event is still scheduled")
		}
		for _, prefix := range []string{unstable, v1} {
			answers(t, request(t, bob, http.MethodPost, prefix+"/delayed_events/"+delayID+"/cancel", nil))
		}
	})
	t.Run("13: there is no delay", func(t *testing.T) {
		for _, prefix := range []string{v3, unstable} {
			refuses(t, request(t, alice, http.MethodPut, dedicated(prefix), homeserver.JSON{"content": homeserver.JSON{}}), 400, "M_MISSING_PARAM")
		}
	})
	t.Run("14: another user's state", func(t *testing.T) {
		body := homeserver.JSON{"delay_ms": 3600000, "state_key": "key", "content": homeserver.JSON{"text": "alice's"}}
		delayID := do(t, alice, http.MethodPut, dedicated(v3), body).Get("delay_id").Str
		do(t, bob, http.MethodPut, homeserver.StatePath(roomID, memberType, "key"), homeserver.JSON{"text": "bob's"})
		answers(t, request(t, alice, http.MethodPost, v1+"/delayed_events/"+delayID+"/send", nil))
		require.Equal(t, "alice's", textOf(t, bob, roomID, "key"))
	})
	t.Run("17: another user's token", func(t *testing.T) {
		events := unstable + "/delayed_events/" + later(t, alice, roomID, "alice's", "text")
		for _, action := range []string{"restart", "send", "cancel"} {
			refuses(t, request(t, bob, http.MethodPost, events+"/"+action, nil), 404, "M_NOT_FOUND")
			refuses(t, request(t, bob, http.MethodPost, events, homeserver.JSON{"action": action}), 404, "M_NOT_FOUND")
		}
		answers(t, request(t, alice, http.MethodPost, events+"/restart", nil))
		answers(t, request(t, server.Anonymous(), http.MethodPost, events+"/restart", nil))
	})
	t.Run("18: an action that does not exist", func(t *testing.T) {
		events := unstable + "/delayed_events/" + later(t, alice, roomID, "key 18", "text")
		refuses(t, request(t, alice, http.MethodPost, events, homeserver.JSON{"action": "repeat"}), 400, "M_INVALID_PARAM")
		refuses(t, request(t, alice, http.MethodPost, events+"/repeat", nil), 404, "M_UNRECOGNIZED")
	})
}

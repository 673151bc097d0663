package integration

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// Only the sender of a delayed event finds its delay ID in the event. That holds for a waiting sync, and for all later reads.
func TestDelayIDInUnsigned(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, nil, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		waiting, others := alice.follow(t, roomID), bob.follow(t, roomID)
		delayID := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+"?org.matrix.msc4140.delay=500",
			JSON{"msgtype": "m.text", "body": "later", "n": 9007199254740991}).Get("delay_id").Str
		require.NotEmpty(t, delayID)
		hasDelayID := func(event gjson.Result) {
			t.Helper()
			require.Equal(t, delayID, event.Get("unsigned.delay_id").Str, event.Raw)
			require.Equal(t, delayID, event.Get(`unsigned.org\.matrix\.msc4140\.delay_id`).Str, event.Raw)
			require.Equal(t, "9007199254740991", event.Get("content.n").Raw, event.Raw)
		}
		isIt := func(event gjson.Result) bool { return event.Get("content.body").Str == "later" }
		sent := waiting.await(t, "the delayed event", isIt)
		hasDelayID(sent)
		require.NotContains(t, others.await(t, "the delayed event", isIt).Raw, "delay_id")
		alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"msgtype": "m.text", "body": "now"})

		room, eventID := "/rooms/"+url.PathEscape(roomID), url.PathEscape(sent.Get("event_id").Str)
		for path, where := range map[string]string{
			"/sync?use_state_after=true": `rooms.join.` + gjsonKey(roomID) + `.timeline.events.#(content.body=="later")`,
			"/sync":                      `rooms.join.` + gjsonKey(roomID) + `.timeline.events.#(content.body=="later")`,
			room + "/messages?dir=b":     `chunk.#(content.body=="later")`,
			room + "/event/" + eventID:   `@this`,
			room + "/context/" + eventID: `event`,
		} {
			for _, version := range []string{"v3", "r0"} {
				res := alice.must(t, http.MethodGet, "/_matrix/client/"+version+path, nil)
				hasDelayID(res.Get(where))
				require.Equal(t, 1, strings.Count(string(res.Body), `"delay_id"`), "only this one: %s", res)
				res = bob.must(t, http.MethodGet, "/_matrix/client/"+version+path, nil)
				require.True(t, res.Get(where).Exists(), res)
				require.NotContains(t, string(res.Body), "delay_id")
			}
		}
	})
}

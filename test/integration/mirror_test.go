package integration

import (
	"fmt"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const syncPath = "/_matrix/client/v3/sync"

// mirror is a client that knows a room's state only from state_after.
type mirror struct {
	u     *user
	query url.Values
	// rooms are the states of rooms, by room ID. A state has its events by type and state key.
	rooms map[string]map[string]gjson.Result
	last  homeserver.Response
}

func (u *user) mirror(query url.Values) *mirror {
	if query == nil {
		query = url.Values{}
	}
	query.Set("use_state_after", "true")
	return &mirror{u: u, query: query, rooms: map[string]map[string]gjson.Result{}}
}

func stateKeyOf(e gjson.Result) string { return e.Get("type").Str + "|" + e.Get("state_key").Str }

// sync makes one sync request and returns the joined rooms.
func (m *mirror) sync(t *testing.T, timeout time.Duration) gjson.Result {
	t.Helper()
	m.query.Set("timeout", fmt.Sprint(timeout.Milliseconds()))
	m.last = m.u.must(t, http.MethodGet, syncPath+"?"+m.query.Encode(), nil)
	m.query.Set("since", m.last.Get("next_batch").Str)
	for _, kind := range []string{"join", "leave"} {
		for roomID, room := range m.last.Get("rooms." + kind).Map() {
			require.False(t, room.Get("state").Exists(), "state and state_after: %s", room)
			after := room.Get("state_after.events")
			require.True(t, after.IsArray(), "no state_after in %s", room)
			if m.rooms[roomID] == nil {
				m.rooms[roomID] = map[string]gjson.Result{}
			}
			told := map[string]bool{}
			for _, e := range after.Array() {
				require.False(t, told[stateKeyOf(e)], "told twice in one answer: %s", after)
				told[stateKeyOf(e)] = true
				m.rooms[roomID][stateKeyOf(e)] = e
			}
		}
	}
	return m.last.Get("rooms.join")
}

// awaitEvent syncs until an event is in a room's timeline. It returns the room's part of that answer.
func (m *mirror) awaitEvent(t *testing.T, roomID, eventID string) gjson.Result {
	t.Helper()
	deadline := time.Now().Add(soon)
	for time.Now().Before(deadline) {
		room := m.sync(t, time.Second).Get(gjsonKey(roomID))
		for _, e := range room.Get("timeline.events").Array() {
			if e.Get("event_id").Str == eventID {
				return room
			}
		}
	}
	t.Fatalf("%s did not come", eventID)
	return gjson.Result{}
}

// known returns the event IDs of a room's state as the client knows it, by type and state key.
func (m *mirror) known(roomID string) map[string]string {
	known := map[string]string{}
	for key, e := range m.rooms[roomID] {
		known[key] = e.Get("event_id").Str
	}
	return known
}

// fullState returns the event IDs of a room's state as the roomserver knows it, by type and state key.
func (u *user) fullState(t *testing.T, roomID string) map[string]string {
	t.Helper()
	state := map[string]string{}
	for _, e := range u.must(t, http.MethodGet, "/_matrix/client/v3/rooms/"+roomID+"/state", nil).Get("@this").Array() {
		state[stateKeyOf(e)] = e.Get("event_id").Str
	}
	return state
}

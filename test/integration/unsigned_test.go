package integration

import (
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// Only the sender of a delayed event finds its delay ID in the event. That holds for a waiting sync, and for all later reads.
func TestDelayIDInUnsigned(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			testDelayIDInUnsigned(t, start(t, homeserver.Config{Postgres: db.open(t), Search: true, MSCs: []string{"msc2836"}}))
		})
	}
}

func testDelayIDInUnsigned(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice, bob)
	first := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"msgtype": "m.text", "body": "first"}).
		Get("event_id").Str
	waiting, others := alice.follow(t, roomID), bob.follow(t, roomID)

	// send sends a delayed event, waits for it, and returns its event ID. Content with which it can be recognised is in "what".
	delayIDs := map[string]string{} // by event ID
	send := func(path, what string, content JSON) string {
		t.Helper()
		content["what"], content["n"] = what, 9007199254740991
		delayID := alice.must(t, http.MethodPut, path+"?org.matrix.msc4140.delay=500", content).Get("delay_id").Str
		require.NotEmpty(t, delayID)
		isIt := func(event gjson.Result) bool { return event.Get("content.what").Str == what }
		event := waiting.await(t, "the "+what, isIt)
		require.NotContains(t, others.await(t, "the "+what, isIt).Raw, "delay_id")
		eventID := event.Get("event_id").Str
		delayIDs[eventID] = delayID
		requireDelayIDs(t, event, delayIDs)
		return eventID
	}
	message := send(homeserver.SendPath(roomID, "m.room.message"), "message", JSON{
		"msgtype": "m.text", "body": "later", "m.relates_to": JSON{"rel_type": "m.reference", "event_id": first},
	})
	state := send(homeserver.StatePath(roomID, "org.example.a/b", "k/1"), "state", JSON{})
	unkeyed := send(homeserver.StatePath(roomID, "org.example.a/b", ""), "state without a key", JSON{})
	member := send(homeserver.StatePath(roomID, "m.room.member", alice.UserID), "membership", JSON{"membership": "join"})
	alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"msgtype": "m.text", "body": "now"})

	search := JSON{"search_categories": JSON{"room_events": JSON{
		"search_term": "later", "include_state": true, "event_context": JSON{"before_limit": 5, "after_limit": 5},
	}}}
	// The message is indexed a moment later. In that moment Dendrite may answer 500, because its snapshot does not have the message yet.
	eventually(t, "the message is found", func() bool {
		return alice.do(t, http.MethodPost, "/_matrix/client/v3/search", search).Get("search_categories.room_events.results.#").Int() == 1
	})
	const v3, v1 = "v3 r0", "v1 unstable"
	room, eventPath := "/rooms/"+url.PathEscape(roomID), url.PathEscape(message)
	relations, states := room+"/relations/"+url.PathEscape(first), room+"/state/org.example.a%2Fb"
	for _, read := range []struct {
		versions, path string
		post           JSON // a POST with this body
		has            []string
	}{
		{v3, "/sync?use_state_after=true", nil, []string{message, state, unkeyed, member}},
		{v3, "/sync", nil, []string{message, state, unkeyed, member}},
		{v3, room + "/messages?dir=b", nil, []string{message, state, unkeyed, member}},
		{v3, room + "/event/" + eventPath, nil, []string{message}},
		{v3, room + "/context/" + eventPath, nil, []string{message, state}},
		{v3, room + "/members", nil, []string{member}},
		{v3, room + "/state", nil, []string{state, unkeyed, member}},
		{v3, states + "/k%2F1?format=event", nil, []string{state}},
		{v3, states + "?format=event", nil, []string{unkeyed}},
		{v3, states + "/?format=event", nil, []string{unkeyed}},
		{v1, relations, nil, []string{message}},
		{v1, relations + "/m.reference", nil, []string{message}},
		{v1, relations + "/m.reference/m.room.message?dir=f", nil, []string{message}},
		{v3, "/search", search, []string{message, state, unkeyed, member}},
		{"unstable", "/event_relationships", JSON{"event_id": message, "room_id": roomID}, []string{message}},
	} {
		for version := range strings.FieldsSeq(read.versions) {
			method, path, body := http.MethodGet, "/_matrix/client/"+version+read.path, any(nil)
			if read.post != nil {
				method, body = http.MethodPost, read.post
			}
			t.Run(method+" "+version+read.path, func(t *testing.T) {
				for _, reader := range []struct {
					*user
					delayIDs map[string]string
				}{{alice, delayIDs}, {bob, nil}} {
					require.Subset(t, requireDelayIDs(t, reader.must(t, method, path, body).Get("@this"), reader.delayIDs), read.has)
				}
			})
		}
	}

	// A content that looks like a delayed event is shown as it is.
	alice.must(t, http.MethodPut, homeserver.StatePath(roomID, "org.example.looks", ""),
		JSON{"event_id": message, "type": "m.room.message", "sender": alice.UserID, "content": JSON{}})
	require.NotContains(t, string(alice.must(t, http.MethodGet, "/_matrix/client/v3"+room+"/state/org.example.looks", nil).Body), "delay_id")

	// Nobody is notified of an own event, so the path needs no delay IDs.
	notified := func(u *user) string {
		return string(u.must(t, http.MethodGet, "/_matrix/client/v3/notifications", nil).Body)
	}
	eventually(t, "Bob is notified", func() bool { return strings.Contains(notified(bob), message) })
	require.NotContains(t, notified(bob), "delay_id")
	require.NotContains(t, notified(alice), message)
}

// requireDelayIDs demands that the events in an answer have exactly these delay IDs, which are by event ID. It returns the IDs of all events
// in the answer.
func requireDelayIDs(t *testing.T, answer gjson.Result, delayIDs map[string]string) []string {
	t.Helper()
	shown := map[string]bool{}
	var look func(value gjson.Result)
	look = func(value gjson.Result) {
		if eventID := value.Get("event_id").Str; eventID != "" && value.Get("content").Exists() {
			shown[eventID] = true
			require.Equal(t, delayIDs[eventID], value.Get("unsigned.delay_id").Str, value.Raw)
			require.Equal(t, delayIDs[eventID], value.Get(`unsigned.org\.matrix\.msc4140\.delay_id`).Str, value.Raw)
			if delayIDs[eventID] == "" {
				require.NotContains(t, value.Raw, "delay_id")
			} else {
				require.Equal(t, "9007199254740991", value.Get("content.n").Raw, value.Raw)
			}
		}
		value.ForEach(func(_, field gjson.Result) bool {
			if field.IsObject() || field.IsArray() {
				look(field)
			}
			return true
		})
	}
	look(answer)
	return slices.Collect(maps.Keys(shown))
}

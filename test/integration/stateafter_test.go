package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// These tests check the state after the timeline in /sync (MSC4222).

func (u *user) put(t *testing.T, roomID, eventType, stateKey string, content JSON) string {
	t.Helper()
	return u.must(t, http.MethodPut, homeserver.StatePath(roomID, eventType, stateKey), content).Get("event_id").Str
}

func (u *user) say(t *testing.T, roomID string) string {
	t.Helper()
	return u.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"msgtype": "m.text", "body": "x"}).Get("event_id").Str
}

// act changes the membership of another user, or the user's own.
func (u *user) act(t *testing.T, roomID, what string, body JSON) {
	t.Helper()
	u.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/"+what, body)
}

func events(ids gjson.Result) (all []string) {
	for _, e := range ids.Array() {
		all = append(all, e.Get("event_id").Str)
	}
	return all
}

// memberKeys returns the users of the member events.
func memberKeys(events gjson.Result) (keys []string) {
	for _, e := range events.Array() {
		if e.Get("type").Str == "m.room.member" {
			keys = append(keys, e.Get("state_key").Str)
		}
	}
	slices.Sort(keys)
	return keys
}

func filter(t *testing.T, f JSON) string {
	t.Helper()
	data, err := json.Marshal(f)
	require.NoError(t, err)
	return string(data)
}

func TestStateAfter(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		for _, test := range []struct {
			name string
			run  func(*testing.T, *server)
		}{
			{"Names", testStateAfterNames}, {"Timeline", testStateAfterTimeline}, {"LazyMembers", testStateAfterLazyMembers},
			{"Joining", testStateAfterJoining}, {"Leaving", testStateAfterLeaving}, {"Filters", testStateAfterFilters},
			{"Redacted", testStateAfterRedacted}, {"Mirror", testStateAfterMirror},
		} {
			t.Run(test.name, func(t *testing.T) { test.run(t, s) })
		}
	})
}

// The field has the name that the request asks for, and is absent without a request for it. The server advertises the feature.
func testStateAfterNames(t *testing.T, s *server) {
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	alice.follow(t, roomID).awaitEvent(t, alice.say(t, roomID))
	for query, want := range map[string]string{
		"use_state_after=true":                                         "state_after",
		"org.matrix.msc4222.use_state_after=true":                      "org.matrix.msc4222.state_after",
		"use_state_after=true&org.matrix.msc4222.use_state_after=true": "state_after",
		"use_state_after=false":                                        "state",
		"use_state_after":                                              "state",
		"":                                                             "state",
	} {
		for _, version := range []string{"v3", "r0"} {
			room := alice.must(t, http.MethodGet, "/_matrix/client/"+version+"/sync?filter="+
				url.QueryEscape(`{"room":{"timeline":{"limit":2}}}`)+"&"+query, nil).Get("rooms.join." + gjsonKey(roomID))
			for _, name := range []string{"state", "state_after", "org.matrix.msc4222.state_after"} {
				require.Equal(t, name == want, room.Get(gjsonKey(name)).Exists(), "%q: %s", query, room)
			}
			require.NotEmpty(t, room.Get(gjsonKey(want)+".events").Array())
		}
	}
	for _, who := range []*homeserver.Client{s.Anonymous(), {URL: s.URL, Token: "forged"}} {
		res, err := who.Do(t.Context(), http.MethodGet, syncPath+"?use_state_after=true", nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, res.Code)
	}
	for _, query := range []string{"since=nonsense", "filter=%7B"} {
		require.Equal(t, http.StatusBadRequest, alice.do(t, http.MethodGet, syncPath+"?use_state_after=true&"+query, nil).Code)
	}
	versions := alice.must(t, http.MethodGet, "/_matrix/client/versions", nil)
	require.True(t, versions.Get(`unstable_features.org\.matrix\.msc4222`).Bool(), versions)
	require.True(t, versions.Get(`unstable_features.org\.matrix\.e2e_cross_signing`).Bool(), "what Dendrite says: %s", versions)
	require.NotEmpty(t, versions.Get("versions").Array())
}

// A state event is in state_after exactly once, whether it is in the timeline or before it. Without changes the field is an empty list.
func testStateAfterTimeline(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice, bob)
	m := bob.mirror(url.Values{"filter": {`{"room":{"timeline":{"limit":3}}}`}})
	bob.follow(t, roomID).awaitEvent(t, alice.say(t, roomID))
	m.sync(t, 0)
	require.Equal(t, bob.fullState(t, roomID), m.known(roomID), "an initial sync")

	room := m.awaitEvent(t, roomID, alice.say(t, roomID))
	require.Empty(t, room.Get("state_after.events").Array(), "nothing has changed")

	topic := alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "a"})
	room = m.awaitEvent(t, roomID, topic)
	require.Equal(t, []string{topic}, events(room.Get("state_after.events")))

	// The timeline has a gap.
	alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "b"})
	topic = alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "c"})
	var last string
	for range 5 {
		last = alice.say(t, roomID)
	}
	alice.follow(t, roomID).awaitEvent(t, last)
	room = m.awaitEvent(t, roomID, last)
	require.True(t, room.Get("timeline.limited").Bool(), room)
	require.NotContains(t, events(room.Get("timeline.events")), topic)
	require.Equal(t, []string{topic}, events(room.Get("state_after.events")))

	// The room is in the answer for another reason than state.
	require.Equal(t, http.StatusOK, alice.do(t, http.MethodPut, "/_matrix/client/v3/rooms/"+roomID+"/typing/"+alice.UserID,
		JSON{"typing": true, "timeout": 10000}).Code)
	eventually(t, "typing", func() bool {
		room := m.sync(t, time.Second).Get(gjsonKey(roomID))
		if room.Get("ephemeral").Exists() {
			require.Equal(t, "[]", room.Get("state_after.events").Raw)
			return true
		}
		return false
	})

	// A full sync contains the whole state again.
	m.query.Set("full_state", "true")
	room = m.sync(t, 0).Get(gjsonKey(roomID))
	require.Len(t, room.Get("state_after.events").Array(), len(m.known(roomID)))
	require.Equal(t, bob.fullState(t, roomID), m.known(roomID))
}

// With lazily loaded members, state_after first has the members of events in the timeline, and then every member event that changes.
func testStateAfterLazyMembers(t *testing.T, s *server) {
	alice, bob, carol, dora := s.newUser(t), s.newUser(t), s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice, bob, carol, dora)
	alice.put(t, roomID, "m.room.name", "", JSON{"name": "without heroes"})
	lazily := `{"room":{"timeline":{"limit":2},"state":{"lazy_load_members":true}}}`
	bob.say(t, roomID)
	last := bob.say(t, roomID)
	alice.follow(t, roomID).awaitEvent(t, last)

	m := alice.mirror(url.Values{"filter": {lazily}})
	room := m.sync(t, 0).Get(gjsonKey(roomID))
	require.Equal(t, []string{alice.UserID, bob.UserID}, memberKeys(room.Get("state_after.events")), "the client's own, and the timeline's")
	require.Contains(t, m.known(roomID), "m.room.create|")

	room = m.awaitEvent(t, roomID, carol.say(t, roomID))
	require.Equal(t, []string{carol.UserID}, memberKeys(room.Get("state_after.events")), "who speaks for the first time")
	room = m.awaitEvent(t, roomID, carol.say(t, roomID))
	require.Empty(t, memberKeys(room.Get("state_after.events")), "and then again")

	// The change of a member is reported even if the client does not know the member.
	alice.act(t, roomID, "kick", JSON{"user_id": dora.UserID})
	eventually(t, "the kick", func() bool {
		m.sync(t, time.Second)
		return m.rooms[roomID]["m.room.member|"+dora.UserID].Get("content.membership").Str == "leave"
	})

	// Each member event in the timeline is also in state_after, in private and public rooms.
	private, err := alice.CreateRoom(t.Context(), JSON{"preset": "private_chat", "invite": []string{bob.UserID}})
	require.NoError(t, err)
	require.NoError(t, bob.Join(t.Context(), private))
	alice.act(t, private, "invite", JSON{"user_id": carol.UserID})
	alice.follow(t, private).awaitEvent(t, alice.say(t, private))
	whole := alice.mirror(url.Values{"filter": {`{"room":{"timeline":{"limit":50},"state":{"lazy_load_members":true}}}`}})
	room = whole.sync(t, 0).Get(gjsonKey(private))
	require.Equal(t, []string{alice.UserID, bob.UserID, carol.UserID}, memberKeys(room.Get("state_after.events")))
	require.Equal(t, alice.fullState(t, private), whole.known(private))
}

// A user who joins a room gets its whole state, whatever else happened since the last sync.
func testStateAfterJoining(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice)
	alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "old"})
	m := bob.mirror(nil)
	m.sync(t, 0)
	require.NoError(t, bob.Join(t.Context(), roomID))
	m.awaitEvent(t, roomID, bob.say(t, roomID))
	require.Equal(t, bob.fullState(t, roomID), m.known(roomID))

	// If a user changes the display name right after joining, Dendrite treats the user as one who was joined before.
	other := s.room(t, alice)
	alice.put(t, other, "m.room.topic", "", JSON{"topic": "old"})
	require.NoError(t, bob.Join(t.Context(), other))
	bob.put(t, other, "m.room.member", bob.UserID, JSON{"membership": "join", "displayname": "Bob"})
	last := bob.say(t, other)
	bob.follow(t, other).awaitEvent(t, last)
	m.awaitEvent(t, other, last)
	require.Equal(t, bob.fullState(t, other), m.known(other))

	// A user who only changes the display name was joined before.
	name := bob.put(t, roomID, "m.room.member", bob.UserID, JSON{"membership": "join", "displayname": "Bob"})
	room := m.awaitEvent(t, roomID, name)
	require.Equal(t, []string{name}, events(room.Get("state_after.events")))
}

// A user who leaves a room gets the changes until then, and no later ones.
func testStateAfterLeaving(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	after := func(m *mirror, roomID string) (told gjson.Result) {
		eventually(t, "the end", func() bool {
			m.sync(t, time.Second)
			told = m.last.Get("rooms.leave." + gjsonKey(roomID) + ".state_after.events")
			return told.Exists()
		})
		return told
	}
	own := "m.room.member|" + bob.UserID

	roomID := s.room(t, alice, bob)
	m := bob.mirror(nil)
	bob.follow(t, roomID).awaitEvent(t, bob.say(t, roomID))
	m.sync(t, 0)
	topic := alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "seen"})
	bob.act(t, roomID, "leave", JSON{})
	alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "not for bob"})
	alice.act(t, roomID, "ban", JSON{"user_id": bob.UserID})
	alice.follow(t, roomID).awaitEvent(t, alice.say(t, roomID))
	told := after(m, roomID)
	require.Len(t, told.Array(), 2, told)
	require.Equal(t, topic, m.known(roomID)["m.room.topic|"])
	require.Equal(t, "ban", m.rooms[roomID][own].Get("content.membership").Str)

	// The user joins and leaves between two syncs.
	brief := s.room(t, alice)
	alice.put(t, brief, "m.room.topic", "", JSON{"topic": "seen"})
	require.NoError(t, bob.Join(t.Context(), brief))
	want := bob.fullState(t, brief)
	bob.act(t, brief, "leave", JSON{})
	alice.put(t, brief, "m.room.topic", "", JSON{"topic": "not for bob"})
	alice.follow(t, brief).awaitEvent(t, alice.say(t, brief))
	after(m, brief)
	known := m.known(brief)
	require.Equal(t, "leave", m.rooms[brief][own].Get("content.membership").Str)
	delete(known, own)
	delete(want, own)
	require.Equal(t, want, known)

	// The user was only invited.
	closed, err := alice.CreateRoom(t.Context(), JSON{"preset": "private_chat", "invite": []string{bob.UserID}})
	require.NoError(t, err)
	eventually(t, "the invite", func() bool {
		m.sync(t, time.Second)
		return m.last.Get("rooms.invite." + gjsonKey(closed)).Exists()
	})
	alice.put(t, closed, "m.room.topic", "", JSON{"topic": "not for bob"})
	bob.act(t, closed, "leave", JSON{})
	after(m, closed)
	require.Equal(t, []string{own}, slices.Collect(maps.Keys(m.known(closed))))

	// A user who joins again gets the whole state.
	require.NoError(t, bob.Join(t.Context(), brief))
	m.awaitEvent(t, brief, bob.say(t, brief))
	require.Equal(t, bob.fullState(t, brief), m.known(brief))
}

// A filter, in the request or stored, applies to the changes.
func testStateAfterFilters(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice, bob)
	alice.put(t, roomID, "org.example.a", "x", JSON{"url": "mxc://localhost/x"})
	alice.put(t, roomID, "org.example.b", "x", JSON{})
	bob.put(t, roomID, "m.call.member", "x", JSON{})
	alice.follow(t, roomID).awaitEvent(t, alice.say(t, roomID))
	for state, want := range map[string][]string{
		`"types":["org.example.*"]`:                                      {"org.example.a|x", "org.example.b|x"},
		`"types":["org.*"],"not_types":["*.b"]`:                          {"org.example.a|x"},
		`"senders":["` + bob.UserID + `"],"not_types":["m.room.member"]`: {"m.call.member|x"},
		`"contains_url":true`:                                            {"org.example.a|x"},
		`"rooms":["!none:localhost"]`:                                    {},
		`"not_rooms":["` + roomID + `"]`:                                 {},
		`"types":["m.call.member"],"not_senders":["` + bob.UserID + `"]`: {},
	} {
		body := []byte(`{"event_format":"federation","room":{"timeline":{"limit":1},"state":{` + state + `}}}`)
		stored := alice.must(t, http.MethodPost, "/_matrix/client/v3/user/"+alice.UserID+"/filter", body).Get("filter_id").Str
		for _, filter := range []string{string(body), stored} {
			m := alice.mirror(url.Values{"filter": {filter}})
			room := m.sync(t, 0).Get(gjsonKey(roomID))
			require.ElementsMatch(t, want, slices.Collect(maps.Keys(m.known(roomID))), state)
			for _, e := range room.Get("state_after.events").Array() {
				require.True(t, e.Get("prev_events").Exists(), e)
			}
		}
	}
}

// A redacted state event has its redacted content.
func testStateAfterRedacted(t *testing.T, s *server) {
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	topic := alice.put(t, roomID, "m.room.topic", "", JSON{"topic": "secret"})
	redaction := alice.must(t, http.MethodPut, "/_matrix/client/v3/rooms/"+roomID+"/redact/"+topic+"/1", JSON{}).Get("event_id").Str
	alice.follow(t, roomID).awaitEvent(t, redaction)
	m := alice.mirror(nil)
	m.sync(t, 0)
	require.Equal(t, topic, m.known(roomID)["m.room.topic|"])
	require.Empty(t, m.rooms[roomID]["m.room.topic|"].Get("content.topic").Str)
}

// While several users act at once, clients keep syncing. In the end each client knows the room's current state.
func testStateAfterMirror(t *testing.T, s *server) {
	alice := s.newUser(t)
	others := []*user{s.newUser(t), s.newUser(t), s.newUser(t)}
	rooms := []string{s.room(t, append(others, alice)...), s.room(t, append(others, alice)...)}
	var clients []*mirror
	for i, limit := range []int{1, 3, 50} {
		clients = append(clients, alice.mirror(url.Values{"filter": {filter(t, JSON{"room": JSON{"timeline": JSON{"limit": limit}}})}}))
		if i > 0 {
			clients[i].sync(t, 0)
		}
	}
	const rounds, keys = 15, 4
	done := make(chan struct{})
	var writers sync.WaitGroup
	for w, u := range others {
		writers.Go(func() {
			for i := range rounds {
				roomID := rooms[(i+w)%len(rooms)]
				u.put(t, roomID, memberType, fmt.Sprint("key", i%keys), JSON{"by": w, "i": i})
				u.say(t, roomID)
				if i%5 == 4 {
					u.act(t, roomID, "leave", JSON{})
					_ = u.Join(t.Context(), roomID)
				}
			}
		})
	}
	go func() {
		writers.Wait()
		close(done)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		for _, m := range clients {
			m.sync(t, 0)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	for _, roomID := range rooms {
		last := alice.say(t, roomID)
		alice.follow(t, roomID).awaitEvent(t, last)
	}
	want := map[string]map[string]string{}
	for _, roomID := range rooms {
		want[roomID] = alice.fullState(t, roomID)
	}
	for _, m := range clients {
		m.sync(t, 0)
		for _, roomID := range rooms {
			require.Equal(t, want[roomID], m.known(roomID), m.query.Get("filter"))
		}
	}
}

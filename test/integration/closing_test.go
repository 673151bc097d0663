package integration

import (
	"cmp"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// docs/protocol.md, sections 3 and 4: closing and replacement.

func TestClosing(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		t.Run("CopyOfTheOriginal", func(t *testing.T) { testCopy(t, alice, bob, roomID) })
		t.Run("Redacted", func(t *testing.T) { testRedacted(t, s, alice, bob, roomID) })
		t.Run("SenderLeft", func(t *testing.T) { testSenderLeft(t, s, alice, roomID) })
		t.Run("SenderCameBack", func(t *testing.T) { testSenderCameBack(t, s, alice, roomID) })
		t.Run("LoggedOut", func(t *testing.T) { testLoggedOut(t, s, bob, roomID) })
		t.Run("Replaced", func(t *testing.T) { testReplaced(t, s, alice, bob, roomID) })
		t.Run("ReplacedInTheMomentOfExpiry", func(t *testing.T) { testReplacedAtExpiry(t, s, alice, bob, roomID, 16) })
		t.Run("OrderInARoom", func(t *testing.T) { testOrder(t, alice, bob, roomID) })
		t.Run("AllAtOnce", func(t *testing.T) { testAllAtOnce(t, s) })
		t.Run("PurgedRoom", func(t *testing.T) { testPurged(t, s) })
	})
}

func testCopy(t *testing.T, alice, bob *user, roomID string) {
	follower := bob.follow(t, roomID)
	content := JSON{
		"html": "<a&b>", "n": 9007199254740991, "nested": JSON{"m.will_expire": 3},
		"m.relates_to": JSON{"rel_type": "m.reference", "event_id": "$other", "more": true},
		"m.new":        []any{nil, false, "x"},
	}
	state := alice.sendState(t, roomID, "copy", 1, content)
	content["m.will_expire"] = 1
	message := sentBy(t, alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.encrypted"), content))
	for _, sent := range []sent{state, message} {
		closing := follower.awaitClosing(t, sent.eventID, "expired")
		original := alice.event(t, roomID, sent.eventID)
		for _, field := range []string{"type", "sender", "state_key"} {
			require.Equal(t, original.Get(field).Raw, closing.Get(field).Raw, field)
		}
		want := original.Get("content").Value().(map[string]any)
		require.Equal(t, "running", want["m.will_expire"])
		require.Contains(t, want, "m.relates_to")
		want["m.will_expire"] = "expired"
		want["m.relates_to"] = map[string]any{"event_id": sent.eventID, "rel_type": "m.expire.relationship"}
		require.Equal(t, want, closing.Get("content").Value())
	}
	require.Equal(t, "expired", alice.state(t, roomID, "copy").Get(`content.m\.will_expire`).Str)
}

// briefly is the life time, in seconds, of events that are stopped before they expire.
var briefly = patience.Life(5)

// gone waits until the tokens are refused, and then until brief events would have expired. It requires that no closing event was sent.
func gone(t *testing.T, s *server, watcher *user, roomID string, events ...sent) {
	t.Helper()
	for _, sent := range events {
		eventually(t, "the token is refused", func() bool {
			code, _ := s.keepAlive(t, "refresh", sent.token)
			return code == http.StatusNotFound
		})
	}
	control := watcher.sendMessage(t, roomID, briefly)
	watcher.follow(t, roomID).awaitClosing(t, control.eventID, "expired")
	for _, sent := range events {
		require.Empty(t, watcher.closings(t, roomID, sent.eventID))
	}
}

func testRedacted(t *testing.T, s *server, alice, bob *user, roomID string) {
	events := []sent{alice.sendMessage(t, roomID, briefly), alice.sendState(t, roomID, "redacted", briefly, JSON{"secret": 1})}
	for _, sent := range events {
		alice.must(t, http.MethodPut, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/redact/"+url.PathEscape(sent.eventID)+"/"+sent.eventID[1:9], JSON{})
	}
	gone(t, s, bob, roomID, events...)
}

func testSenderLeft(t *testing.T, s *server, alice *user, roomID string) {
	var events []sent
	for _, how := range []string{"leave", "kick", "ban"} {
		carol := s.newUser(t)
		require.NoError(t, carol.Join(t.Context(), roomID))
		events = append(events, carol.sendState(t, roomID, carol.UserID, briefly, nil))
		if how == "leave" {
			carol.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/leave", JSON{})
		} else {
			alice.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/"+how, JSON{"user_id": carol.UserID})
		}
	}
	gone(t, s, alice, roomID, events...)
}

// A sender that leaves the room loses its timers. Timers that it starts after it has come back run.
func testSenderCameBack(t *testing.T, s *server, alice *user, roomID string) {
	carol := s.newUser(t)
	require.NoError(t, carol.Join(t.Context(), roomID))
	before := carol.sendMessage(t, roomID, briefly)
	carol.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/leave", JSON{})
	require.NoError(t, carol.Join(t.Context(), roomID))
	after := carol.sendMessage(t, roomID, 600)
	gone(t, s, alice, roomID, before)
	s.refreshed(t, after.token)
	code, errcode := s.keepAlive(t, "end", after.token)
	require.Equal(t, http.StatusOK, code, errcode)
}

// The timer continues when its sender logs out, because it exists for clients that disappear.
func testLoggedOut(t *testing.T, s *server, bob *user, roomID string) {
	carol := s.newUser(t)
	require.NoError(t, carol.Join(t.Context(), roomID))
	sent := carol.sendState(t, roomID, carol.UserID, patience.Life(2), nil)
	carol.must(t, http.MethodPost, "/_matrix/client/v3/logout/all", JSON{})
	bob.follow(t, roomID).awaitClosing(t, sent.eventID, "expired")
}

func testReplaced(t *testing.T, s *server, alice, bob *user, roomID string) {
	path := homeserver.StatePath(roomID, memberType, "replaced")
	for _, by := range []*user{alice, bob} {
		old := alice.sendState(t, roomID, "replaced", 600, JSON{"by": by.UserID})
		by.must(t, http.MethodPut, path, JSON{"left": by.UserID})
		s.refused(t, old.token) // already before the sender has its answer
		code, _ := s.keepAlive(t, "end", old.token)
		require.Equal(t, http.StatusNotFound, code)

		first := by.sendState(t, roomID, "replaced", 600, JSON{"first": by.UserID})
		second := by.sendState(t, roomID, "replaced", 600, JSON{"second": by.UserID})
		require.NotEqual(t, first, second)
		s.refused(t, first.token)
		s.refreshed(t, second.token)
		code, _ = s.keepAlive(t, "end", second.token)
		require.Equal(t, http.StatusOK, code)
		require.Empty(t, alice.closings(t, roomID, old.eventID))
		require.Empty(t, alice.closings(t, roomID, first.eventID))
		require.Len(t, alice.closings(t, roomID, second.eventID), 1)
	}
	// State with another key, type or room does not stop the timer.
	other := alice.sendState(t, roomID, "other", 600, nil)
	alice.must(t, http.MethodPut, path, JSON{"x": 1})
	alice.must(t, http.MethodPut, homeserver.StatePath(roomID, "m.call.other", "other"), JSON{"x": 1})
	require.Equal(t, http.StatusOK, alice.do(t, http.MethodPut, homeserver.StatePath(s.room(t, alice), memberType, "other"), JSON{}).Code)
	s.refreshed(t, other.token)
}

// Many events expire and are replaced at the same moment, by users whose sends overlap. The roomserver is overloaded, so that it builds
// some events before earlier ones are in the room.
func testReplacedAtExpiry(t *testing.T, s *server, alice, bob *user, roomID string, races int) {
	life := patience.Life(2)
	rivals := []*user{alice, bob}
	for range 6 {
		rival := s.newUser(t)
		require.NoError(t, rival.Join(t.Context(), roomID))
		rivals = append(rivals, rival)
	}
	var wg sync.WaitGroup
	wants := make([]string, races)
	key := func(i int) string { return fmt.Sprint("race", i) }
	for i := range races {
		owner, rival := rivals[i%len(rivals)], rivals[(i+i/len(rivals)+1)%len(rivals)]
		wg.Go(func() {
			owner.sendState(t, roomID, key(i), life, nil)
			<-time.After(time.Duration(life)*time.Second - time.Duration(i%8)*20*time.Millisecond)
			wants[i] = rival.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, key(i)), JSON{"new": i}).Get("event_id").Str
		})
	}
	wg.Wait()
	control := bob.sendMessage(t, roomID, life)
	bob.follow(t, roomID).awaitClosing(t, control.eventID, "expired")
	for i := range races {
		require.Equal(t, wants[i], alice.state(t, roomID, key(i)).Get("event_id").Str, "a closing event overwrote newer state")
	}
}

func testOrder(t *testing.T, alice, bob *user, roomID string) {
	follower := bob.follow(t, roomID)
	ids := map[string]int{}
	for i := range 3 {
		ids[alice.sendMessage(t, roomID, (3-i)*patience.Life(2)).eventID] = 2 - i
	}
	var order []int
	follower.await(t, "all three", func(e gjson.Result) bool {
		if n, ok := ids[e.Get(`content.m\.relates_to.event_id`).Str]; ok {
			order = append(order, n)
		}
		return len(order) == 3
	})
	require.Equal(t, []int{0, 1, 2}, order)
}

// Many events of one room expire at once, and overlapping sends fork the event graph. Nothing is lost, the order is kept, and the last
// events are the room's state. That holds even if a client gave its event a time in the future.
func testAllAtOnce(t *testing.T, s *server) {
	users := []*user{s.newUser(t), s.newUser(t), s.newUser(t)}
	roomID := s.room(t, users...)
	follower := users[0].follow(t, roomID)
	tomorrow := fmt.Sprint("?ts=", time.Now().Add(24*time.Hour).UnixMilli())
	var ids []string
	put := func(i, seconds int) string {
		path := homeserver.StatePath(roomID, memberType, fmt.Sprint("key", i))
		if i%3 == 0 {
			path += tomorrow
		}
		return users[i%len(users)].must(t, http.MethodPut, path, JSON{"m.will_expire": seconds, "i": i}).Get("event_id").Str
	}
	const n = 20
	for i := range n {
		ids = append(ids, put(i, 60))
	}
	for i := range n { // the repeated content is no new event and is sent fast, so the events expire faster than they can be closed
		require.Equal(t, ids[i], put(i, 2))
	}
	closings := map[string]string{}
	follower.await(t, "all of them", func(e gjson.Result) bool {
		if original := e.Get(`content.m\.relates_to.event_id`).Str; original != "" {
			require.Empty(t, closings[original], "closed twice")
			closings[original] = e.Get("event_id").Str
		}
		return len(closings) == n
	})
	users[0].must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": "joins what is left beside one another"})
	for i, id := range ids {
		require.Equal(t, closings[id], users[1].state(t, roomID, fmt.Sprint("key", i)).Get("event_id").Str, i)
	}
	// Dendrite's /sync may show two parallel events in either order, if they are in one answer.
	require.NoError(t, s.Stop())
	events := slices.DeleteFunc(s.events(t), func(e roomEvent) bool { return !slices.Contains(ids, e.closes) })
	slices.SortFunc(events, func(a, b roomEvent) int { return cmp.Compare(a.nid, b.nid) })
	var order []string
	for _, e := range events {
		order = append(order, e.closes)
	}
	require.Equal(t, ids, order)
	require.NoError(t, s.Start(t.Context()))
}

func testPurged(t *testing.T, s *server) {
	client, err := homeserver.RegisterAdmin(t.Context(), s.URL, homeserver.SharedSecret, "admin")
	require.NoError(t, err)
	admin := &user{client, s}
	roomID := s.room(t, admin)
	message, state := admin.sendMessage(t, roomID, 600), admin.sendState(t, roomID, "x", 600, nil)
	delayed := admin.delayMessage(t, roomID, time.Hour, "delayed")
	admin.must(t, http.MethodPost, "/_dendrite/admin/purgeRoom/"+url.PathEscape(roomID), nil)
	for _, sent := range []sent{message, state} {
		eventually(t, "the token is refused", func() bool {
			code, _ := s.keepAlive(t, "refresh", sent.token)
			return code == http.StatusNotFound
		})
	}
	require.Equal(t, "M_NOT_FOUND", admin.finalised(t, delayed).Get("error.errcode").Str)
}

// These room versions differ from the default. In the oldest, event IDs have another form. In the one with pseudo IDs, an event's sender
// and state key differ from those that the client sent.
func TestRoomVersions(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{Expiration: unlimited})
	alice, bob := s.newUser(t), s.newUser(t)
	versions := []string{"1", "2", "6", "11", "org.matrix.msc4014"}
	// Room IDs of this version have no server name. Only the newer line of Dendrite supports it.
	const hashed = "12"
	capabilities := alice.must(t, http.MethodGet, "/_matrix/client/v3/capabilities", nil)
	if capabilities.Get(`capabilities.m\.room_versions.available.` + hashed).Exists() {
		versions = append(versions, hashed)
	}
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			roomID, err := alice.CreateRoom(t.Context(), JSON{"room_version": version})
			require.NoError(t, err)
			require.NoError(t, bob.Join(t.Context(), roomID))
			follower := bob.follow(t, roomID)
			expired := alice.sendState(t, roomID, alice.UserID, 1, JSON{"call": 1})
			closing := follower.awaitClosing(t, expired.eventID, "expired")
			require.Equal(t, alice.UserID, closing.Get("sender").Str)
			require.Equal(t, alice.UserID, closing.Get("state_key").Str)

			old := alice.sendState(t, roomID, alice.UserID, 600, JSON{"call": 2})
			require.Equal(t, old, alice.sendState(t, roomID, alice.UserID, 600, JSON{"call": 2}))
			replaced := alice.sendState(t, roomID, alice.UserID, 600, JSON{"call": 3})
			s.refused(t, old.token)
			code, errcode := s.keepAlive(t, "end", replaced.token)
			require.Equal(t, http.StatusOK, code, errcode)

			message := bob.sendMessage(t, roomID, 600)
			bob.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/leave", JSON{})
			eventually(t, "the token is refused", func() bool {
				code, _ := s.keepAlive(t, "refresh", message.token)
				return code == http.StatusNotFound
			})
		})
	}
}

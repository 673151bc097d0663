package integration

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// docs/protocol.md, section 3: the server drops a timer without a closing event. The tests of redactions, of senders that leave or are
// kicked or banned, and of purged rooms are in closing_test.go.

func TestDropping(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		client, err := homeserver.RegisterAdmin(t.Context(), s.URL, homeserver.SharedSecret, "admin")
		require.NoError(t, err)
		admin := &user{client, s}
		t.Run("Deactivated", func(t *testing.T) { testDeactivated(t, s, admin) })
		t.Run("Forgotten", func(t *testing.T) { testForgotten(t, s, admin) })
		t.Run("EvacuatedUser", func(t *testing.T) { testEvacuatedUser(t, s, admin) })
		t.Run("EvacuatedRoom", func(t *testing.T) { testEvacuatedRoom(t, s, admin) })
		t.Run("Upgraded", func(t *testing.T) { testUpgraded(t, s, admin) })
		t.Run("PowerTaken", func(t *testing.T) { testPowerTaken(t, s, admin) })
		t.Run("PowerGivenBack", func(t *testing.T) { testPowerGivenBack(t, s, admin) })
		t.Run("ReplacedWhileMuted", func(t *testing.T) { testReplacedWhileMuted(t, s, admin) })
	})
}

// brief sends a message and a state event with brief life times.
func (u *user) brief(t *testing.T, roomID string) []sent {
	t.Helper()
	return []sent{u.sendMessage(t, roomID, briefly), u.sendState(t, roomID, u.UserID, briefly, nil)}
}

// dropped calls do, and requires that the server then drops the timers of the given events, for this reason and no other. There must be no
// closing event, no valid token and no timer. The watcher must be able to see the room. An empty roomID means that nobody can.
func (s *server) dropped(t *testing.T, watcher *user, roomID, reason string, events []sent, do func()) {
	t.Helper()
	label := `reason="` + reason + `"`
	running := s.metric(t, "dendrite_expiration_running_timers")
	drops, all := s.metric(t, "dendrite_expiration_drops_total", label), s.metric(t, "dendrite_expiration_drops_total")
	closings := s.metric(t, "dendrite_expiration_closings_total")
	do()
	n := float64(len(events))
	eventually(t, "the timers are dropped", func() bool { // refreshing the tokens would keep the events alive
		return s.metric(t, "dendrite_expiration_drops_total", label) == drops+n
	})
	if roomID == "" {
		roomID = s.room(t, watcher)
	}
	gone(t, s, watcher, roomID, events...)
	eventually(t, "no timer is left", func() bool {
		return s.metric(t, "dendrite_expiration_running_timers") == running-n
	})
	require.Equal(t, all+n, s.metric(t, "dendrite_expiration_drops_total"), "for other reasons")
	require.Equal(t, closings+1, s.metric(t, "dendrite_expiration_closings_total"), "others than the control of gone")
}

// levels changes the power levels of a room.
func (u *user) levels(t *testing.T, roomID string, change func(levels map[string]any)) {
	t.Helper()
	path := homeserver.StatePath(roomID, "m.room.power_levels", "")
	levels := u.must(t, http.MethodGet, path, nil).Get("@this").Value().(map[string]any)
	change(levels)
	u.must(t, http.MethodPut, path, levels)
}

// A deactivated account leaves its rooms.
func testDeactivated(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID := s.room(t, admin, carol)
	s.dropped(t, admin, roomID, "sender_gone", carol.brief(t, roomID), func() {
		localpart, _, _ := strings.Cut(carol.UserID[1:], ":")
		carol.must(t, http.MethodPost, "/_matrix/client/v3/account/deactivate", JSON{"auth": JSON{
			"type": "m.login.password", "identifier": JSON{"type": "m.id.user", "user": localpart}, "password": "only-for-tests",
		}})
	})
}

func testForgotten(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID := s.room(t, admin, carol)
	s.dropped(t, admin, roomID, "sender_gone", carol.brief(t, roomID), func() {
		for _, do := range []string{"leave", "forget"} {
			carol.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/"+do, JSON{})
		}
	})
}

func testEvacuatedUser(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID, other := s.room(t, admin, carol), s.room(t, carol, admin)
	s.dropped(t, admin, roomID, "sender_gone", append(carol.brief(t, roomID), carol.brief(t, other)...), func() {
		admin.must(t, http.MethodPost, "/_dendrite/admin/evacuateUser/"+url.PathEscape(carol.UserID), nil)
	})
}

func testEvacuatedRoom(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID := s.room(t, admin, carol)
	s.dropped(t, admin, "", "sender_gone", append(carol.brief(t, roomID), admin.brief(t, roomID)...), func() {
		admin.must(t, http.MethodPost, "/_dendrite/admin/evacuateRoom/"+url.PathEscape(roomID), nil)
	})
}

// When a room is upgraded, Dendrite takes away the power of ordinary members to send messages. Events that their senders may still send
// are closed in the old room, where clients see that the call has ended.
func testUpgraded(t *testing.T, s *server, admin *user) {
	bob := s.newUser(t)
	roomID := s.room(t, admin, bob)
	message := bob.sendMessage(t, roomID, 4*briefly) // because an upgrade takes a while
	state, byAdmin := bob.sendState(t, roomID, bob.UserID, briefly, nil), admin.brief(t, roomID)
	drops := s.metric(t, "dendrite_expiration_drops_total", `reason="forbidden"`)
	newRoomID := admin.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/upgrade",
		JSON{"new_version": "10"}).Get("replacement_room").Str
	s.refreshed(t, message.token) // the power is checked only when the event is closed
	for _, sent := range append(byAdmin, state) {
		admin.follow(t, roomID).awaitClosing(t, sent.eventID, "expired")
	}
	eventually(t, "the message's timer is dropped", func() bool {
		return s.metric(t, "dendrite_expiration_drops_total", `reason="forbidden"`) == drops+1
	})
	gone(t, s, admin, roomID, message)
	for _, e := range admin.timeline(t, newRoomID) {
		require.NotEqual(t, "m.room.message", e.Get("type").Str, "a closing event in the new room")
	}
}

func testPowerTaken(t *testing.T, s *server, admin *user) {
	bob := s.newUser(t)
	roomID := s.room(t, admin, bob)
	s.dropped(t, admin, roomID, "forbidden", bob.brief(t, roomID), func() {
		admin.levels(t, roomID, func(levels map[string]any) {
			levels["events_default"] = 50
			levels["events"].(map[string]any)[memberType] = 50
		})
	})
	require.Equal(t, "running", admin.state(t, roomID, bob.UserID).Get(`content.m\.will_expire`).Str)
}

// The sender's power counts at the time of the closing, and not in between.
func testPowerGivenBack(t *testing.T, s *server, admin *user) {
	bob := s.newUser(t)
	roomID := s.room(t, admin, bob)
	events := bob.brief(t, roomID)
	for _, level := range []int{50, 0} {
		admin.levels(t, roomID, func(levels map[string]any) {
			levels["events_default"] = level
			levels["events"].(map[string]any)[memberType] = level
		})
	}
	for _, sent := range events {
		admin.follow(t, roomID).awaitClosing(t, sent.eventID, "expired")
	}
}

// A moderator mutes a user and replaces the user's event. The moderator's event stays.
func testReplacedWhileMuted(t *testing.T, s *server, admin *user) {
	bob := s.newUser(t)
	roomID := s.room(t, admin, bob)
	state := bob.sendState(t, roomID, "muted", briefly, nil) // if the key was a user's ID, only that user could set the state
	s.dropped(t, admin, roomID, "replaced", []sent{state}, func() {
		admin.levels(t, roomID, func(levels map[string]any) { levels["users"].(map[string]any)[bob.UserID] = -1 })
		s.refreshed(t, state.token)
		admin.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "muted"), JSON{"ended": "by a moderator"})
		s.refused(t, state.token)
	})
	require.Equal(t, "by a moderator", admin.state(t, roomID, "muted").Get("content.ended").Str)
}

package integration

import (
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// rejoinAfter is the delay of scheduled joins. It is longer than a deactivation takes on a busy machine.
var rejoinAfter = time.Duration(patience.Life(5)) * time.Second

// delayMembership schedules a membership event, which must be accepted, and returns its delay ID.
func (u *user) delayMembership(t *testing.T, roomID, target string, delay time.Duration, content JSON) string {
	t.Helper()
	return delayID(t, u.must(t, http.MethodPut, homeserver.StatePath(roomID, "m.room.member", target)+delayParameter+ms(delay), content))
}

// delayRejoin schedules the user's own join. It sets a display name, so that it differs from the current membership.
func (u *user) delayRejoin(t *testing.T, roomID string, delay time.Duration) string {
	t.Helper()
	return u.delayMembership(t, roomID, u.UserID, delay, JSON{"membership": "join", "displayname": "back"})
}

// membership returns the current membership event of a user, as another user sees it.
func (u *user) membership(t *testing.T, roomID, userID string) gjson.Result {
	t.Helper()
	return u.must(t, http.MethodGet, homeserver.StatePath(roomID, "m.room.member", userID), nil).Get("@this")
}

// inRoom performs an action on a room, such as "leave".
func (u *user) inRoom(t *testing.T, roomID, action string, body JSON) {
	t.Helper()
	u.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/"+action, body)
}

func (u *user) deactivate(t *testing.T) {
	t.Helper()
	localpart, _, _ := strings.Cut(u.UserID[1:], ":")
	u.must(t, http.MethodPost, "/_matrix/client/v3/account/deactivate", JSON{"auth": JSON{
		"type": "m.login.password", "identifier": JSON{"type": "m.id.user", "user": localpart}, "password": "only-for-tests",
	}})
}

// cancelled waits until a delayed event is finalised, and requires that it looks as if its owner had cancelled it.
func (u *user) cancelled(t *testing.T, delayID string) {
	t.Helper()
	e := u.finalised(t, delayID)
	require.False(t, e.Get("event_id").Exists(), e)
	require.False(t, e.Get("error").Exists(), e)
}

// marked waits until all events of a room that are due within the given time have been handled, and are visible. It relies on the order:
// the due events of a room are sent in order.
func (u *user) marked(t *testing.T, roomID string, after time.Duration) {
	t.Helper()
	u.event(t, roomID, u.finalised(t, u.delayMessage(t, roomID, after, "mark")).Get("event_id").Str)
}

// A user who leaves a room, in whatever way, does not come back by a join that was scheduled earlier.
func TestScheduledRejoin(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		client, err := homeserver.RegisterAdmin(t.Context(), s.URL, homeserver.SharedSecret, "admin")
		require.NoError(t, err)
		admin := &user{client, s}
		evacuate := func(t *testing.T, what, id string) {
			admin.must(t, http.MethodPost, "/_dendrite/admin/"+what+"/"+url.PathEscape(id), nil)
		}
		for name, goOut := range map[string]func(t *testing.T, carol *user, roomID string){
			"Leaves": func(t *testing.T, carol *user, roomID string) { carol.inRoom(t, roomID, "leave", JSON{}) },
			"IsKicked": func(t *testing.T, carol *user, roomID string) {
				admin.inRoom(t, roomID, "kick", JSON{"user_id": carol.UserID})
			},
			"IsBanned": func(t *testing.T, carol *user, roomID string) {
				admin.inRoom(t, roomID, "ban", JSON{"user_id": carol.UserID})
			},
			"IsEvacuated":    func(t *testing.T, carol *user, _ string) { evacuate(t, "evacuateUser", carol.UserID) },
			"RoomIsEmptied":  func(t *testing.T, _ *user, roomID string) { evacuate(t, "evacuateRoom", roomID) },
			"HasItSentFirst": testOwnLeaveSent,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				carol := s.newUser(t)
				roomID := s.room(t, admin, carol)
				rejoin := carol.delayRejoin(t, roomID, rejoinAfter)
				goOut(t, carol, roomID)
				carol.cancelled(t, rejoin)
				if name != "RoomIsEmptied" {
					eventually(t, "the user is seen to be out", func() bool {
						return admin.membership(t, roomID, carol.UserID).Get("membership").Str != "join"
					})
				}
				require.NotContains(t, string(carol.must(t, http.MethodGet, "/_matrix/client/v3/joined_rooms", nil).Body), roomID)
			})
		}
		t.Run("NothingElseIsCancelled", func(t *testing.T) { t.Parallel(); testNothingElseIsCancelled(t, s, admin) })
		t.Run("IsDeactivated", func(t *testing.T) { t.Parallel(); testDeactivationCancels(t, s, admin) })
		t.Run("RacesItsDeactivation", func(t *testing.T) { t.Parallel(); testDeactivationRace(t, s, admin) })
		t.Run("LoggedOut", func(t *testing.T) { t.Parallel(); testLogoutCancelsNothing(t, s, admin) })
	})
}

// testOwnLeaveSent leaves the room by a delayed event of the user's own.
func testOwnLeaveSent(t *testing.T, carol *user, roomID string) {
	leave := carol.delayMembership(t, roomID, carol.UserID, time.Hour, JSON{"membership": "leave"})
	carol.acted(t, unstableDelayed, leave, "send")
	require.True(t, carol.finalised(t, leave).Get("event_id").Exists())
}

// testNothingElseIsCancelled: the user's other events, other rooms, and events scheduled after the return, are not cancelled.
func testNothingElseIsCancelled(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID, other := s.room(t, carol, admin), s.room(t, carol)
	kick := carol.delayMembership(t, roomID, admin.UserID, time.Hour, JSON{"membership": "leave"})
	elsewhere := carol.delayRejoin(t, other, time.Hour)
	message := carol.delayMessage(t, roomID, time.Hour, "message")
	rejoin := carol.delayRejoin(t, roomID, time.Hour)
	carol.inRoom(t, roomID, "leave", JSON{})
	carol.cancelled(t, rejoin)
	require.NoError(t, carol.Join(t.Context(), roomID))
	again := carol.delayRejoin(t, roomID, rejoinAfter)
	require.ElementsMatch(t, []string{kick, elsewhere, message, again}, carol.scheduled(t))
	sent := admin.event(t, roomID, carol.finalised(t, again).Get("event_id").Str)
	require.Equal(t, "back", sent.Get("content.displayname").Str, "the user is joined")
}

// testDeactivationCancels: when the request is answered, all events are cancelled.
func testDeactivationCancels(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID, other := s.room(t, admin, carol), s.room(t, carol, admin)
	delayIDs := []string{
		carol.delayRejoin(t, roomID, rejoinAfter), carol.delayRejoin(t, other, time.Hour),
		carol.delayMessage(t, roomID, rejoinAfter, "speaks"), carol.delayState(t, other, "key", rejoinAfter, JSON{"a": 1}),
	}
	admins := admin.delayMessage(t, roomID, time.Hour, "stays")
	carol.deactivate(t)
	for _, delayID := range delayIDs {
		for _, action := range []string{"send", "restart", "cancel"} {
			require.Equal(t, http.StatusNotFound, admin.actDelayed(t, unstableDelayed, delayID, action).Code, "nothing is left of it")
		}
	}
	require.Contains(t, admin.scheduled(t), admins)
	admin.marked(t, roomID, rejoinAfter)
	admin.marked(t, other, time.Second)
	for _, roomID := range []string{roomID, other} {
		require.Equal(t, "leave", admin.membership(t, roomID, carol.UserID).Get("membership").Str)
	}
}

// testDeactivationRace: requests that overlap with the deactivation may be accepted or refused, but none of their events is ever sent.
func testDeactivationRace(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID := s.room(t, admin, carol)
	carol.delayRejoin(t, roomID, rejoinAfter) // so that there is at least one
	var schedules sync.WaitGroup
	for n := range 30 {
		schedules.Go(func() {
			time.Sleep(time.Duration(n) * 10 * time.Millisecond)
			path := homeserver.StatePath(roomID, "m.room.member", carol.UserID) + delayParameter + ms(rejoinAfter)
			res, err := carol.Do(t.Context(), http.MethodPut, path, JSON{"membership": "join", "displayname": "back"})
			if err == nil {
				s.remember(res)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	carol.deactivate(t)
	schedules.Wait()
	admin.marked(t, roomID, rejoinAfter+time.Second)
	require.Equal(t, "leave", admin.membership(t, roomID, carol.UserID).Get("membership").Str)
	for _, e := range admin.timeline(t, roomID) {
		require.NotEqual(t, "back", e.Get("content.displayname").Str, e)
	}
}

// testLogoutCancelsNothing: a delayed event belongs to the account, not to the device that scheduled it.
func testLogoutCancelsNothing(t *testing.T, s *server, admin *user) {
	carol := s.newUser(t)
	roomID := s.room(t, admin, carol)
	follower := admin.follow(t, roomID)
	carol.delayMessage(t, roomID, time.Second, "after the logout")
	carol.must(t, http.MethodPost, "/_matrix/client/v3/logout", JSON{})
	follower.await(t, "the message", withBody("after the logout"))
}

// The output stream may report a leave late. A join that is due before the report is refused.
func TestRejoinBeforeTheStream(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice, carol := s.newUser(t), s.newUser(t)
			roomID := s.room(t, alice, carol)
			require.NoError(t, s.Failpoints(string(failpoint.Stream)+" hold"))
			rejoin, later := carol.delayRejoin(t, roomID, time.Duration(patience.Life(2))*time.Second), carol.delayRejoin(t, roomID, time.Hour)
			carol.inRoom(t, roomID, "leave", JSON{})
			require.Equal(t, http.StatusForbidden, carol.actDelayed(t, unstableDelayed, later, "send").Code)
			require.Equal(t, "M_FORBIDDEN", carol.finalised(t, rejoin).Get("error.errcode").Str)
			eventually(t, "the user is seen to be out", func() bool {
				return alice.membership(t, roomID, carol.UserID).Get("membership").Str == "leave"
			})

			// When the report arrives, the user may be back. Events that were scheduled since then are not cancelled.
			require.NoError(t, carol.Join(t.Context(), roomID))
			again := carol.delayRejoin(t, roomID, time.Hour)
			require.NoError(t, s.Failpoints())
			carol.cancelled(t, later)
			require.Equal(t, []string{again}, carol.scheduled(t))
		})
	}
}

// The server crashes after an account is deactivated and before its events are cancelled. After the start the events of all users are
// checked. That includes guests and users of application services, who have neither devices nor passwords.
func TestCrashInADeactivation(t *testing.T) {
	t.Parallel()
	registration := bridge(t)
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := start(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited, AppServices: []string{registration}})
			alice, carol := s.newUser(t), s.newUser(t)
			client, err := s.RegisterGuest(t.Context())
			require.NoError(t, err)
			guest := &user{client, s}
			bridge := &user{&homeserver.Client{URL: s.URL, UserID: "@bridge:localhost", Token: "as-token"}, s}
			roomID, err := alice.CreateRoom(t.Context(), JSON{"initial_state": []JSON{
				{"type": "m.room.guest_access", "state_key": "", "content": JSON{"guest_access": "can_join"}},
			}})
			require.NoError(t, err)
			gone := []*user{carol, guest, bridge}
			delayIDs := map[*user]string{}
			delay := time.Duration(patience.Life(8)) * time.Second
			for _, u := range gone {
				require.NoError(t, u.Join(t.Context(), roomID))
				delayIDs[u] = u.delayMessage(t, roomID, delay, "speaks")
			}
			mark := alice.delayMessage(t, roomID, delay, "mark")
			s.Kill()
			s.database(t, "userapi", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
				accounts, _, err := cm.Connection(options)
				require.NoError(t, err)
				for _, u := range gone {
					localpart, _, _ := strings.Cut(u.UserID[1:], ":")
					res, err := accounts.Exec("UPDATE userapi_accounts SET is_deactivated = TRUE WHERE localpart = $1", localpart)
					require.NoError(t, err)
					n, err := res.RowsAffected()
					require.NoError(t, err)
					require.EqualValues(t, 1, n, u.UserID)
				}
			})
			require.NoError(t, s.Start(t.Context()))
			require.True(t, alice.finalised(t, mark).Get("event_id").Exists())
			for _, u := range gone {
				eventually(t, "nothing is left of the event", func() bool {
					res, err := u.Do(t.Context(), http.MethodGet, stableDelayed+"/"+delayIDs[u], nil)
					return err == nil && res.Code == http.StatusNotFound
				})
			}
			for _, e := range alice.timeline(t, roomID) {
				require.NotEqual(t, "speaks", e.Get("content.body").Str, e)
			}
		})
	}
}

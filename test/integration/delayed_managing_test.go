package integration

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

func testManaging(t *testing.T, alice, bob *user, roomID string) {
	follower := alice.follow(t, roomID)
	delay := time.Duration(patience.Life(2)) * time.Second
	for _, path := range []string{unstableDelayed, stableDelayed} {
		// Restarts keep the event from being sent for longer than its delay.
		pushed := alice.delayMessage(t, roomID, delay, "pushed"+path)
		for range 3 {
			<-time.After(delay / 2)
			alice.acted(t, path, pushed, "restart")
		}
		require.Contains(t, alice.scheduled(t), pushed)
		restarted := time.Now()
		alice.acted(t, path, pushed, "restart")
		e := follower.await(t, "the pushed event", withBody("pushed"+path))
		require.GreaterOrEqual(t, e.Get("origin_server_ts").Int(), restarted.Add(delay).UnixMilli(), "early")

		now := alice.delayMessage(t, roomID, time.Hour, "now"+path)
		alice.acted(t, path, now, "send")
		follower.await(t, "the event that was sent", withBody("now"+path))

		never := alice.delayMessage(t, roomID, time.Hour, "never"+path)
		alice.acted(t, path, never, "cancel")
		require.Empty(t, alice.scheduled(t))
	}

	id := alice.delayMessage(t, roomID, time.Hour, "mine")
	// On the unstable path a token is not needed. A valid one must be the owner's.
	for token, want := range map[string]int{bob.Token: 404, alice.Token: 200, "expired": 200} {
		for path, body := range map[string]any{"/restart": nil, "": JSON{"action": "restart"}} {
			c := *alice.Client
			c.Token = token
			res, err := c.Do(t.Context(), http.MethodPost, unstableDelayed+"/"+id+path, body)
			require.NoError(t, err)
			require.Equal(t, want, res.Code, res)
		}
	}
	// Older clients have the action in the body. On the other paths a body is allowed, and ignored.
	for _, r := range []clientRequest{
		{http.MethodPost, unstableDelayed + "/" + id, JSON{"action": "restart"}, true},
		{http.MethodPost, unstableDelayed + "/" + id + "/restart", JSON{}, true},
		{http.MethodPost, unstableDelayed + "/" + id + "/restart", []byte("x"), true},
		{http.MethodPost, stableDelayed + "/" + id + "/restart", []byte("x"), false},
		{http.MethodPost, unstableDelayed + "/" + id, JSON{"action": "cancel"}, true},
	} {
		res := alice.try(t, r)
		require.Equal(t, http.StatusOK, res.Code, "%v: %s", r, res)
	}
	require.Empty(t, alice.scheduled(t))
}

// A service that acts for many users behind one address finds finalised events, whoever guesses behind the same address. With one delay ID
// too there is a limit, also when its event is finalised. An action with an access token counts as its user's.
func TestActionsWithoutATokenAreLimited(t *testing.T) {
	t.Parallel()
	limits := JSON{"rate_limiting": JSON{
		"unknown_token": JSON{"threshold": 1, "cooloff_ms": 3600000}, "token": JSON{"threshold": 2, "cooloff_ms": 3600000},
	}}
	onEachDatabase(t, limits, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		busy := alice.delayMessage(t, roomID, time.Hour, "busy")
		guess := strings.Repeat("x", tokenLength)
		require.Equal(t, http.StatusNotFound, alice.actDelayed(t, unstableDelayed, guess, "send").Code)
		for range 2 {
			alice.acted(t, unstableDelayed, busy, "restart")
		}
		for range 5 {
			for _, tooMuch := range []string{guess, busy} {
				for what, r := range actions(tooMuch, "send") {
					if r.anonymous {
						requireLimited(t, alice.try(t, r), what)
					}
				}
			}
			id := alice.delayMessage(t, roomID, time.Hour, "x")
			for range 2 {
				alice.acted(t, unstableDelayed, id, "send")
			}
			require.Equal(t, http.StatusNotFound, alice.actDelayed(t, unstableDelayed, id, "restart").Code)
			requireLimited(t, alice.actDelayed(t, unstableDelayed, id, "restart"), "finalised")
			require.Equal(t, http.StatusNotFound, alice.actDelayed(t, stableDelayed, guess, "send").Code, "with a token the user counts")
		}
		alice.acted(t, stableDelayed, busy, "send")
	})
}

// testFinalised checks the answers about events that are finalised already.
func testFinalised(t *testing.T, alice, bob *user, roomID string) {
	sent, cancelled := alice.delayMessage(t, roomID, time.Hour, "x"), alice.delayMessage(t, roomID, time.Hour, "x")
	timedOut := alice.delayMessage(t, roomID, time.Millisecond, "x")
	alice.acted(t, unstableDelayed, sent, "send")
	alice.acted(t, unstableDelayed, cancelled, "cancel")
	alice.finalised(t, timedOut)
	alice.levels(t, roomID, func(levels map[string]any) { levels["users"].(map[string]any)[bob.UserID] = 50 })
	refused := delayID(t, bob.must(t, http.MethodPut, homeserver.StatePath(roomID, "m.room.name", "")+
		delayParameter+ms(time.Duration(patience.Life(1))*time.Second), JSON{"name": "x"})) // due only after the power is gone
	alice.levels(t, roomID, func(levels map[string]any) { levels["users"].(map[string]any)[bob.UserID] = 0 })
	require.Equal(t, "M_FORBIDDEN", bob.finalised(t, refused).Get("error.errcode").Str)
	for _, restarted := range []bool{false, true} {
		if restarted {
			alice.s.restart(t, true)
		}
		for _, test := range []struct {
			id, action       string
			unstable, stable int
		}{
			{sent, "send", 200, 200},
			{sent, "cancel", 404, 409},
			{sent, "restart", 404, 409},
			{timedOut, "send", 200, 200},
			{timedOut, "cancel", 404, 409},
			{timedOut, "restart", 404, 409},
			{cancelled, "cancel", 200, 200},
			{cancelled, "send", 404, 409},
			{cancelled, "restart", 404, 409},
			{refused, "cancel", 200, 200},
			{refused, "send", 404, 409},
			{refused, "restart", 404, 409},
		} {
			alice := alice
			if test.id == refused {
				alice = bob
			}
			res := alice.actDelayed(t, unstableDelayed, test.id, test.action)
			require.Equal(t, test.unstable, res.Code, "%s: %s", test.action, res)
			if res.Code != http.StatusOK {
				require.Equal(t, "M_NOT_FOUND", res.Get("errcode").Str)
			}
			res = alice.actDelayed(t, stableDelayed, test.id, test.action)
			require.Equal(t, test.stable, res.Code, "%s: %s", test.action, res)
			if res.Code != http.StatusOK {
				require.Equal(t, "M_UNKNOWN", res.Get("errcode").Str)
			}
		}
	}
}

func testLooking(t *testing.T, alice, bob *user, roomID string) {
	before := time.Now().UnixMilli()
	late := alice.delayState(t, roomID, "late", 2*time.Hour, JSON{"big": 9007199254740991})
	early := alice.delayMessage(t, roomID, time.Hour, "early")
	after := time.Now().UnixMilli()
	require.Equal(t, []string{early, late}, alice.scheduled(t), "in the order of the due times")
	require.Empty(t, bob.scheduled(t))

	for path, old := range map[string]bool{stableDelayed: false, unstableDelayed: true} {
		for _, p := range []string{path + "/" + late, path + "/" + late + "/send"} { // a browser's preflight requests
			require.Equal(t, http.StatusOK, alice.do(t, http.MethodOptions, p, nil).Code, p)
		}
		// mautrix sends a body with its GET requests.
		shown := []gjson.Result{alice.must(t, http.MethodGet, path+"/"+late, JSON{}).Get("@this")}
		if old {
			shown = append(shown, alice.must(t, http.MethodGet, path, JSON{}).Get("delayed_events.1"))
		}
		for _, e := range shown {
			require.Equal(t, late, e.Get("delay_id").Str)
			require.Equal(t, roomID, e.Get("room_id").Str)
			require.Equal(t, memberType, e.Get("type").Str)
			require.Equal(t, "late", e.Get("state_key").Str)
			require.Equal(t, `{"big":9007199254740991}`, e.Get("content").Raw)
			require.EqualValues(t, 2*60*60*1000, e.Get("delay_ms").Int())
			require.GreaterOrEqual(t, e.Get("delayed_since_ts").Int(), before)
			require.LessOrEqual(t, e.Get("delayed_since_ts").Int(), after+1)
			require.False(t, e.Get("finalised").Exists() || e.Get("finalised_ts").Exists())
			if old {
				require.Equal(t, e.Get("delay_ms").Raw, e.Get("delay").Raw)
				require.Equal(t, e.Get("delayed_since_ts").Raw, e.Get("running_since").Raw)
			} else {
				require.False(t, e.Get("delay").Exists() || e.Get("running_since").Exists())
			}
		}
		res := bob.do(t, http.MethodGet, path+"/"+late, nil)
		require.Equal(t, http.StatusNotFound, res.Code)
		require.Equal(t, "M_NOT_FOUND", res.Get("errcode").Str)
		res, err := alice.s.Anonymous().Do(t.Context(), http.MethodGet, path+"/"+late, nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, res.Code)
	}
	require.False(t, alice.must(t, http.MethodGet, unstableDelayed, nil).Get("delayed_events.0.state_key").Exists())
	res, err := alice.s.Anonymous().Do(t.Context(), http.MethodGet, unstableDelayed, nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusUnauthorized, res.Code)
	res = alice.do(t, http.MethodGet, stableDelayed, nil)
	require.Equal(t, http.StatusNotFound, res.Code, "the merged text has no list")
	require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str)
	scheduledAt := alice.delayed(t, early).Get("delayed_since_ts").Int()
	<-time.After(2 * time.Millisecond)
	alice.acted(t, unstableDelayed, early, "restart")
	require.Greater(t, alice.delayed(t, early).Get("delayed_since_ts").Int(), scheduledAt)

	alice.acted(t, unstableDelayed, early, "send")
	alice.acted(t, unstableDelayed, late, "cancel")
	require.Empty(t, alice.scheduled(t))
	for _, crash := range []bool{false, true} {
		if crash {
			alice.s.restart(t, true)
		}
		e := alice.delayed(t, early).Get("finalised")
		require.GreaterOrEqual(t, e.Get("finalised_ts").Int(), before)
		old := alice.must(t, http.MethodGet, unstableDelayed+"/"+early, nil)
		require.Equal(t, e.Raw, old.Get("finalised").Raw)
		require.Equal(t, e.Get("finalised_ts").Raw, old.Get("finalised_ts").Raw)
		require.Equal(t, e.Get("event_id").Raw, old.Get("event_id").Raw)
		require.Equal(t, "early", alice.event(t, roomID, e.Get("event_id").Str).Get("content.body").Str)
		require.False(t, e.Get("error").Exists())
		e = alice.delayed(t, late).Get("finalised")
		require.GreaterOrEqual(t, e.Get("finalised_ts").Int(), before)
		require.False(t, e.Get("event_id").Exists() || e.Get("error").Exists(), e)
		require.Equal(t, http.StatusNotFound, bob.do(t, http.MethodGet, stableDelayed+"/"+late, nil).Code)
	}
}

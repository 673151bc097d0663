package integration

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// These tests check delayed events (MSC4140 as merged) from the outside.

const (
	stableDelayed   = "/_matrix/client/v1/delayed_events"
	unstableDelayed = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
	delayParameter  = "?org.matrix.msc4140.delay="
)

// delayedLimits is a configuration without rate limits, and with the given limits of delayed events.
func delayedLimits(limits JSON) JSON {
	return JSON{"rate_limiting": JSON{"enabled": false}, "delayed_events": limits}
}

func TestDelayedEvents(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		for name, test := range map[string]func(t *testing.T, alice, bob *user, roomID string){
			"Forms":              testDelayedForms,
			"BadRequests":        testDelayedBadRequests,
			"BadDedicated":       testDedicatedBadRequests,
			"BadActions":         testBadActions,
			"Repeated":           testDelayedRepeated,
			"Managing":           testManaging,
			"Finalised":          testFinalised,
			"Looking":            testLooking,
			"Order":              testDelayedOrder,
			"RefusedWhenSent":    testRefusedWhenSent,
			"StateOfOthers":      testStateOfOthers,
			"ExpiresOnceSent":    testDelayedExpires,
			"SameState":          testDelayedSameState,
			"OfAGuest":           testDelayedOfGuest,
			"MembershipAtTheEnd": testDelayedMembership,
			"KickAndLeave":       testDelayedKick,
		} {
			t.Run(name, func(t *testing.T) { test(t, alice, bob, s.room(t, alice, bob)) })
		}
	})
}

// delayMessage and delayState schedule an event with the delay in the query. The event must be accepted. They return its delay ID.
func (u *user) delayMessage(t *testing.T, roomID string, delay time.Duration, body string) string {
	t.Helper()
	return delayID(t, u.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+ms(delay),
		JSON{"msgtype": "m.text", "body": body}))
}

func (u *user) delayState(t *testing.T, roomID, key string, delay time.Duration, content JSON) string {
	t.Helper()
	return delayID(t, u.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, key)+delayParameter+ms(delay), content))
}

func ms(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

func delayID(t *testing.T, res homeserver.Response) string {
	t.Helper()
	id := res.Get("delay_id").Str
	require.Len(t, id, tokenLength, res)
	require.Len(t, res.Get("@this").Map(), 1, res)
	return id
}

// actDelayed performs an action on a delayed event. On the path of today's clients it sends no access token, on the stable path it does.
func (u *user) actDelayed(t *testing.T, path, delayID, action string) homeserver.Response {
	t.Helper()
	c := u.Client
	if path == unstableDelayed {
		c = u.s.Anonymous()
	}
	res, err := c.Do(t.Context(), http.MethodPost, path+"/"+delayID+"/"+action, nil)
	require.NoError(t, err)
	return res
}

// acted requires that an action succeeds.
func (u *user) acted(t *testing.T, path, delayID, action string) {
	t.Helper()
	res := u.actDelayed(t, path, delayID, action)
	require.Equal(t, http.StatusOK, res.Code, "%s: %s", action, res)
	require.JSONEq(t, "{}", string(res.Body))
}

// delayed returns a delayed event as its owner sees it.
func (u *user) delayed(t *testing.T, delayID string) gjson.Result {
	t.Helper()
	res, err := u.Do(t.Context(), http.MethodGet, stableDelayed+"/"+delayID, nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.Code, res)
	return res.Get("@this")
}

// finalised waits until a delayed event is finalised, and returns what became of it.
func (u *user) finalised(t *testing.T, delayID string) (e gjson.Result) {
	t.Helper()
	eventually(t, "the event is finalised", func() bool {
		e = u.delayed(t, delayID).Get("finalised")
		return e.Exists()
	})
	return e
}

// scheduled returns the delay IDs of a user's scheduled events, in the order of the answers, page by page.
func (u *user) scheduled(t *testing.T) (delayIDs []string) {
	t.Helper()
	for from := ""; ; {
		page := u.must(t, http.MethodGet, unstableDelayed+from, nil)
		for _, e := range page.Get("delayed_events").Array() {
			delayIDs = append(delayIDs, e.Get("delay_id").Str)
		}
		next := page.Get("next_batch").Str
		if next == "" {
			return delayIDs
		}
		from = "?from=" + url.QueryEscape(next)
	}
}

func withBody(body string) func(gjson.Result) bool {
	return func(e gjson.Result) bool { return e.Get("content.body").Str == body }
}

func testDelayedForms(t *testing.T, alice, _ *user, roomID string) {
	room := "/rooms/" + url.PathEscape(roomID)
	follower := alice.follow(t, roomID)
	const delay = time.Second
	for i, form := range []struct {
		path string
		body JSON
		key  string
	}{
		{"v3" + room + "/send/m.room.message/forms0" + delayParameter + ms(delay), JSON{"body": "0"}, "-"},
		{"r0" + room + "/send/m.room.message/forms1" + delayParameter + ms(delay), JSON{"body": "1"}, "-"},
		{"v3" + room + "/state/" + memberType + "/forms2" + delayParameter + ms(delay), JSON{"body": "2"}, "forms2"},
		{"v3" + room + "/state/" + memberType + delayParameter + ms(delay), JSON{"body": "3"}, ""},
		{"v3" + room + "/delayed_event/m.room.message/forms4", JSON{"delay_ms": delay.Milliseconds(), "content": JSON{"body": "4"}}, "-"},
		{"v3" + room + "/delayed_event/" + memberType + "/forms5", JSON{"delay_ms": delay.Milliseconds(), "content": JSON{"body": "5"}, "state_key": "k"}, "k"},
		{"unstable/org.matrix.msc4140" + room + "/delayed_event/" + memberType + "/forms6", JSON{"delay_ms": delay.Milliseconds(), "content": JSON{"body": "6"}, "state_key": ""}, ""},
	} {
		before := time.Now()
		id := delayID(t, alice.must(t, http.MethodPut, "/_matrix/client/"+form.path, form.body))
		e := follower.await(t, form.path, withBody(strconv.Itoa(i)))
		require.GreaterOrEqual(t, time.Since(before), delay, "early")
		require.GreaterOrEqual(t, e.Get("origin_server_ts").Int(), before.Add(delay).UnixMilli(), "its time is when it was sent")
		require.Equal(t, alice.UserID, e.Get("sender").Str)
		if form.key == "-" {
			require.False(t, e.Get("state_key").Exists())
		} else {
			require.Equal(t, form.key, e.Get("state_key").Str)
		}
		require.Equal(t, e.Get("event_id").Str, alice.finalised(t, id).Get("event_id").Str)
	}
}

func testDelayedBadRequests(t *testing.T, alice, _ *user, roomID string) {
	const day = 24 * 60 * 60 * 1000
	query := homeserver.StatePath(roomID, memberType, "bad") + delayParameter
	stranger, nobody := alice.s.newUser(t), &user{alice.s.Anonymous(), alice.s}
	for name, test := range map[string]struct {
		u          *user
		path       string
		body       any
		code       int
		errcode    string
		additional string
	}{
		"no token":           {nobody, query + "1000", JSON{}, 401, "M_MISSING_TOKEN", ""},
		"no delay":           {alice, query, JSON{}, 400, "M_INVALID_PARAM", ""},
		"two delays":         {alice, query + "1000&" + delayParameter[1:] + "1000", JSON{}, 400, "M_INVALID_PARAM", ""},
		"zero":               {alice, query + "0", JSON{}, 400, "M_INVALID_PARAM", ""},
		"negative":           {alice, query + "-1", JSON{}, 400, "M_INVALID_PARAM", ""},
		"no integer":         {alice, query + "1.5", JSON{}, 400, "M_INVALID_PARAM", ""},
		"beyond all numbers": {alice, query + "99999999999999999999", JSON{}, 400, "M_UNKNOWN", "M_MAX_DELAY_EXCEEDED"},
		"too long":           {alice, query + strconv.Itoa(day+1), JSON{}, 400, "M_UNKNOWN", "M_MAX_DELAY_EXCEEDED"},
		"no body":            {alice, query + "1000", nil, 400, "M_NOT_JSON", ""},
		"not JSON":           {alice, query + "1000", []byte("{"), 400, "M_NOT_JSON", ""},
		"no object":          {alice, query + "1000", []byte("[]"), 400, "M_BAD_JSON", ""},
		"too large":          {alice, query + "1000", JSON{"x": strings.Repeat("x", 70_000)}, 413, "M_TOO_LARGE", ""},
		"without end":        {alice, query + "1000", JSON{"x": strings.Repeat("x", 300_000)}, 413, "M_TOO_LARGE", ""},
		"bad life time":      {alice, query + "1000", JSON{"m.will_expire": -1}, 400, "M_INVALID_PARAM", ""},
		"not joined":         {stranger, query + "1000", JSON{}, 403, "M_FORBIDDEN", ""},
		"malformed":          {alice, query + "%zz", JSON{}, 400, "M_INVALID_PARAM", ""},
		"malformed, escaped": {alice, strings.Replace(query, "org.", "org%2E", 1) + "%zz", JSON{}, 400, "M_INVALID_PARAM", ""},
		"malformed sticky":   {alice, query + "1000&sticky%5Fduration_ms=%zz", JSON{}, 400, "M_INVALID_PARAM", ""},
	} {
		t.Run(name, func(t *testing.T) {
			res := test.u.do(t, http.MethodPut, test.path, test.body)
			requireError(t, res, test.code, test.errcode)
			require.Equal(t, test.additional, res.Get(`org\.matrix\.msc4140\.errcode`).Str)
			if test.additional != "" {
				require.EqualValues(t, day, res.Get(`org\.matrix\.msc4140\.max_delay`).Int())
			}
		})
	}
	require.Empty(t, alice.scheduled(t), "nothing came of any of them")
	alice.acted(t, unstableDelayed, alice.delayState(t, roomID, "bad", 24*time.Hour, JSON{}), "cancel") // the longest delay that is allowed
}

func testDelayedRepeated(t *testing.T, alice, bob *user, roomID string) {
	path := homeserver.SendPath(roomID, "m.room.message") + delayParameter + "60000"
	body := JSON{"body": "repeated"}
	id := delayID(t, alice.must(t, http.MethodPut, path, body))
	require.Equal(t, id, delayID(t, alice.must(t, http.MethodPut, path, body)))
	require.NotEqual(t, id, delayID(t, bob.must(t, http.MethodPut, path, body)), "somebody else's transaction")
	require.Len(t, alice.scheduled(t), 1)
	alice.s.restart(t, true)
	require.Equal(t, id, delayID(t, alice.must(t, http.MethodPut, path, body)))
	require.Equal(t, []string{id}, alice.scheduled(t))
	alice.acted(t, unstableDelayed, id, "cancel")
	require.Equal(t, id, delayID(t, alice.must(t, http.MethodPut, path, body)), "whatever has become of it")
	alice.s.restart(t, true)
	require.Equal(t, id, delayID(t, alice.must(t, http.MethodPut, path, body)))
	require.Empty(t, alice.scheduled(t))
	bob.acted(t, unstableDelayed, bob.scheduled(t)[0], "cancel")
}

func TestDelayedLimits(t *testing.T) {
	t.Parallel()
	limits := delayedLimits(JSON{"max_scheduled_per_user": 2, "max_delay": "1h", "max_finalised_per_user": 3, "keep_finalised": "1h"})
	limits["max_running_per_user"] = 1
	onEachDatabase(t, limits, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		short := alice.delayMessage(t, roomID, time.Minute, "short")
		alice.delayMessage(t, roomID, time.Hour, "long")
		alice.sendMessage(t, roomID, 600) // running events do not count as scheduled
		for form, r := range schedulings(roomID, time.Second) {
			res := alice.try(t, r)
			requireLimited(t, res, form)
			require.InDelta(t, 45_000, res.Get("retry_after_ms").Int(), 15_500, "until the next one is sent")
		}
		bob.delayMessage(t, roomID, time.Minute, "bob's")
		alice.acted(t, unstableDelayed, short, "cancel")

		// An event that expires once it is sent is refused then, because its sender has too many running.
		expiring := func(delay time.Duration) string {
			path := homeserver.SendPath(roomID, "m.room.message") + delayParameter + ms(delay)
			return delayID(t, alice.must(t, http.MethodPut, path, JSON{"m.will_expire": 60}))
		}
		require.Equal(t, "M_LIMIT_EXCEEDED", alice.finalised(t, expiring(time.Millisecond)).Get("error.errcode").Str)
		id := expiring(time.Hour)
		for what, r := range actions(id, "send") {
			requireLimited(t, alice.try(t, r), what)
		}
		require.Contains(t, alice.scheduled(t), id, "it stays scheduled")
		alice.acted(t, unstableDelayed, id, "cancel")
		alice.delayMessage(t, roomID, time.Minute, "another")

		res := alice.do(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "x")+delayParameter+"3600001", JSON{})
		require.EqualValues(t, 3600000, res.Get(`org\.matrix\.msc4140\.max_delay`).Int(), res)

		// A user who schedules and cancels repeatedly leaves only as many finalised events as may be kept.
		var last []string
		for range 5 {
			id := bob.delayMessage(t, roomID, time.Minute, "again")
			bob.acted(t, unstableDelayed, id, "cancel")
			last = append(last, id)
		}
		for i, id := range last {
			res := bob.do(t, http.MethodGet, stableDelayed+"/"+id, nil)
			require.Equal(t, map[bool]int{true: http.StatusOK, false: http.StatusNotFound}[i >= 2], res.Code, "%d: %s", i, res)
		}
	})
}

// Of the events of a user that are due at once, those above the limit are refused. The errors of all limits are those of the rate limits.
func TestDelayedRates(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, JSON{"rate_limiting": JSON{
		"due": JSON{"threshold": 2, "cooloff_ms": 3600000}, "user": JSON{"threshold": 6, "cooloff_ms": 3600000},
	}}, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		follower := bob.follow(t, roomID)
		for i := range 3 {
			alice.delayMessage(t, roomID, time.Second+time.Duration(i)*time.Millisecond, fmt.Sprint("due", i))
		}
		follower.await(t, "the second", withBody("due1"))
		last := alice.delayMessage(t, roomID, time.Second, "last")
		bob.delayMessage(t, roomID, 2*time.Second, "bob's")
		follower.await(t, "another user's", withBody("bob's"))
		final := alice.delayed(t, last).Get("finalised") // because bob's was due later
		require.Equal(t, "M_LIMIT_EXCEEDED", final.Get("error.errcode").Str, final)
		// Scheduling and looking up share one allowance, and actions with an access token have another.
		exhaust := func(r clientRequest) {
			eventually(t, "the limit is reached", func() bool { return alice.try(t, r).Code == http.StatusTooManyRequests })
		}
		exhaust(lookups(last)["list"])
		for _, requests := range []map[string]clientRequest{lookups(last), schedulings(roomID, time.Second)} {
			for what, r := range requests {
				requireLimited(t, alice.try(t, r), what)
			}
		}
		exhaust(actions(last, "cancel")["cancel stable"])
		for _, action := range []string{"restart", "send", "cancel"} {
			for what, r := range actions(last, action) {
				if !r.anonymous {
					requireLimited(t, alice.try(t, r), what)
				}
			}
		}
	})
}

// Scheduled events survive the process. Events that were due while it was down are sent in the order of their deadlines.
func TestDelayedRestart(t *testing.T) {
	t.Parallel()
	for name, crash := range map[string]bool{"SIGTERM": false, "SIGKILL": true} {
		t.Run(name, func(t *testing.T) {
			onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
				alice := s.newUser(t)
				roomID := s.room(t, alice)
				delay := time.Duration(patience.Life(6)) * time.Second
				var want []string
				for i := range 5 {
					alice.delayMessage(t, roomID, time.Second+time.Duration(i)*50*time.Millisecond, fmt.Sprint("overdue", i))
					want = append(want, fmt.Sprint("overdue", i))
				}
				kept := alice.delayState(t, roomID, "kept", delay, JSON{"body": "kept"})
				restarted := time.Now()
				alice.acted(t, unstableDelayed, kept, "restart")
				if crash {
					s.Kill()
				} else {
					require.NoError(t, s.Stop())
				}
				<-time.After(1500 * time.Millisecond)
				require.NoError(t, s.Start(t.Context()))
				require.Contains(t, alice.scheduled(t), kept)
				follower := alice.follow(t, roomID)
				for _, body := range want {
					follower.await(t, body, withBody(body))
				}
				e := follower.await(t, "the one that was not due", withBody("kept"))
				require.GreaterOrEqual(t, e.Get("origin_server_ts").Int(), restarted.Add(delay).UnixMilli(), "early")
				var got []string
				for _, e := range alice.timeline(t, roomID) {
					if body := e.Get("content.body").Str; strings.HasPrefix(body, "overdue") {
						got = append(got, body)
					}
				}
				require.Equal(t, want, got)
			})
		})
	}
}

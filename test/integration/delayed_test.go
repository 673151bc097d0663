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

// These tests check delayed events (MSC4140 as accepted) from the outside.

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
			"Repeated":           testDelayedRepeated,
			"Managing":           testManaging,
			"Finalised":          testFinalised,
			"Looking":            testLooking,
			"Order":              testDelayedOrder,
			"RefusedWhenSent":    testRefusedWhenSent,
			"ReplacedByAnother":  testDelayedReplaced,
			"ExpiresOnceSent":    testDelayedExpires,
			"SameState":          testDelayedSameState,
			"OfAGuest":           testDelayedOfGuest,
			"TimestampIsKept":    testDelayedTimestamp,
			"MembershipAtTheEnd": testDelayedMembership,
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

// finalised waits until a delayed event is finalised, and returns it.
func (u *user) finalised(t *testing.T, delayID string) (e gjson.Result) {
	t.Helper()
	eventually(t, "the event is finalised", func() bool {
		e = u.delayed(t, delayID)
		return e.Get("finalised_ts").Exists()
	})
	return e
}

// scheduled returns the delay IDs of a user's scheduled events, in the order of the answers, page by page.
func (u *user) scheduled(t *testing.T) (delayIDs []string) {
	t.Helper()
	for from := ""; ; {
		page := u.must(t, http.MethodGet, stableDelayed+from, nil)
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
	dedicated := "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) + "/delayed_event/" + memberType + "/bad"
	stranger := alice.s.newUser(t)
	for name, test := range map[string]struct {
		u          *user
		path       string
		body       any
		code       int
		errcode    string
		additional string
	}{
		"no delay":            {alice, query, JSON{}, 400, "M_INVALID_PARAM", ""},
		"zero":                {alice, query + "0", JSON{}, 400, "M_INVALID_PARAM", ""},
		"negative":            {alice, query + "-1", JSON{}, 400, "M_INVALID_PARAM", ""},
		"no integer":          {alice, query + "1.5", JSON{}, 400, "M_INVALID_PARAM", ""},
		"beyond all numbers":  {alice, query + "99999999999999999999", JSON{}, 400, "M_UNKNOWN", "M_MAX_DELAY_EXCEEDED"},
		"too long":            {alice, query + strconv.Itoa(day+1), JSON{}, 400, "M_UNKNOWN", "M_MAX_DELAY_EXCEEDED"},
		"not JSON":            {alice, query + "1000", []byte("{"), 400, "M_NOT_JSON", ""},
		"no object":           {alice, query + "1000", []byte("[]"), 400, "M_BAD_JSON", ""},
		"too large":           {alice, query + "1000", JSON{"x": strings.Repeat("x", 70_000)}, 413, "M_TOO_LARGE", ""},
		"without end":         {alice, query + "1000", JSON{"x": strings.Repeat("x", 300_000)}, 413, "M_TOO_LARGE", ""},
		"bad life time":       {alice, query + "1000", JSON{"m.will_expire": -1}, 400, "M_INVALID_PARAM", ""},
		"not joined":          {stranger, query + "1000", JSON{}, 403, "M_FORBIDDEN", ""},
		"malformed":           {alice, query + "%zz", JSON{}, 400, "M_INVALID_PARAM", ""},
		"field: other case":   {alice, dedicated, JSON{"Delay_MS": 1000, "content": JSON{}}, 400, "M_INVALID_PARAM", ""},
		"field: no delay":     {alice, dedicated, JSON{"content": JSON{}}, 400, "M_INVALID_PARAM", ""},
		"field: zero":         {alice, dedicated, JSON{"content": JSON{}, "delay_ms": 0}, 400, "M_INVALID_PARAM", ""},
		"field: text":         {alice, dedicated, JSON{"content": JSON{}, "delay_ms": "1000"}, 400, "M_INVALID_PARAM", ""},
		"field: too long":     {alice, dedicated, JSON{"content": JSON{}, "delay_ms": day + 1}, 403, "M_FORBIDDEN", ""},
		"field: no content":   {alice, dedicated, JSON{"delay_ms": 1000}, 400, "M_MISSING_PARAM", ""},
		"field: content text": {alice, dedicated, JSON{"delay_ms": 1000, "content": "x"}, 400, "M_BAD_JSON", ""},
		"field: bad key":      {alice, dedicated, JSON{"delay_ms": 1000, "content": JSON{}, "state_key": 1}, 400, "M_BAD_JSON", ""},
		"field: not joined":   {stranger, dedicated, JSON{"delay_ms": 1000, "content": JSON{}}, 403, "M_FORBIDDEN", ""},
	} {
		t.Run(name, func(t *testing.T) {
			res := test.u.do(t, http.MethodPut, test.path, test.body)
			require.Equal(t, test.code, res.Code, res)
			require.Equal(t, test.errcode, res.Get("errcode").Str, res)
			require.NotEmpty(t, res.Get("error").Str)
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

		for action, want := range map[string]int{"restart": 404, "send": 404, "cancel": 404} {
			res := alice.actDelayed(t, path, strings.Repeat("x", tokenLength), action)
			require.Equal(t, want, res.Code, res)
			require.Equal(t, "M_NOT_FOUND", res.Get("errcode").Str)
		}
		res := alice.actDelayed(t, path, never, "unsend")
		require.Equal(t, http.StatusNotFound, res.Code)
		require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str)
	}

	// On the stable path only the owner can act on the event.
	id := alice.delayMessage(t, roomID, time.Hour, "mine")
	res, err := alice.s.Anonymous().Do(t.Context(), http.MethodPost, stableDelayed+"/"+id+"/cancel", nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusUnauthorized, res.Code, res)
	require.Equal(t, http.StatusNotFound, bob.actDelayed(t, stableDelayed, id, "cancel").Code)
	// Older clients have the action in the body. On the other paths a body is allowed.
	for _, test := range []struct {
		path string
		body any
		code int
	}{
		{unstableDelayed + "/" + id, JSON{"action": "restart"}, 200},
		{unstableDelayed + "/" + id, JSON{"action": "unsend"}, 404},
		{unstableDelayed + "/" + id, JSON{}, 400},
		{unstableDelayed + "/" + id, []byte("x"), 400},
		{unstableDelayed + "/" + id, JSON{"action": "restart", "x": strings.Repeat("x", 5000)}, 413},
		{unstableDelayed + "/" + id + "/restart", JSON{}, 200},
		{unstableDelayed + "/" + id, JSON{"action": "cancel"}, 200},
	} {
		res, err := alice.s.Anonymous().Do(t.Context(), http.MethodPost, test.path, test.body)
		require.NoError(t, err)
		require.Equal(t, test.code, res.Code, "%v: %s", test.body, res)
	}
	require.Empty(t, alice.scheduled(t))
}

// testFinalised checks the answers about events that are finalised already.
func testFinalised(t *testing.T, alice, _ *user, roomID string) {
	sent, cancelled := alice.delayMessage(t, roomID, time.Hour, "x"), alice.delayMessage(t, roomID, time.Hour, "x")
	timedOut := alice.delayMessage(t, roomID, time.Millisecond, "x")
	alice.acted(t, unstableDelayed, sent, "send")
	alice.acted(t, unstableDelayed, cancelled, "cancel")
	alice.finalised(t, timedOut)
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
		} {
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
		for _, p := range []string{path, path + "/" + late, path + "/" + late + "/send"} { // a browser's preflight requests
			require.Equal(t, http.StatusOK, alice.do(t, http.MethodOptions, p, nil).Code, p)
		}
		// mautrix sends a body with its GET requests.
		for _, e := range []gjson.Result{
			alice.must(t, http.MethodGet, path, JSON{}).Get("delayed_events.1"),
			alice.must(t, http.MethodGet, path+"/"+late, JSON{}).Get("@this"),
		} {
			require.Equal(t, late, e.Get("delay_id").Str)
			require.Equal(t, roomID, e.Get("room_id").Str)
			require.Equal(t, memberType, e.Get("type").Str)
			require.Equal(t, "late", e.Get("state_key").Str)
			require.Equal(t, `{"big":9007199254740991}`, e.Get("content").Raw)
			require.EqualValues(t, 2*60*60*1000, e.Get("delay_ms").Int())
			require.GreaterOrEqual(t, e.Get("scheduled_at").Int(), before)
			require.LessOrEqual(t, e.Get("scheduled_at").Int(), after+1)
			require.False(t, e.Get("finalised_ts").Exists())
			if old {
				require.Equal(t, e.Get("delay_ms").Raw, e.Get("delay").Raw)
				require.Equal(t, e.Get("scheduled_at").Raw, e.Get("running_since").Raw)
			} else {
				require.False(t, e.Get("delay").Exists() || e.Get("running_since").Exists())
			}
		}
		require.False(t, alice.must(t, http.MethodGet, path, nil).Get("delayed_events.0.state_key").Exists())
		res := bob.do(t, http.MethodGet, path+"/"+late, nil)
		require.Equal(t, http.StatusNotFound, res.Code)
		require.Equal(t, "M_NOT_FOUND", res.Get("errcode").Str)
		for _, p := range []string{path, path + "/" + late} {
			res, err := alice.s.Anonymous().Do(t.Context(), http.MethodGet, p, nil)
			require.NoError(t, err)
			require.Equal(t, http.StatusUnauthorized, res.Code)
		}
	}
	scheduledAt := alice.delayed(t, early).Get("scheduled_at").Int()
	<-time.After(2 * time.Millisecond)
	alice.acted(t, unstableDelayed, early, "restart")
	require.Greater(t, alice.delayed(t, early).Get("scheduled_at").Int(), scheduledAt)

	alice.acted(t, unstableDelayed, early, "send")
	alice.acted(t, unstableDelayed, late, "cancel")
	require.Empty(t, alice.scheduled(t))
	for _, crash := range []bool{false, true} {
		if crash {
			alice.s.restart(t, true)
		}
		e := alice.delayed(t, early)
		require.GreaterOrEqual(t, e.Get("finalised_ts").Int(), before)
		require.Equal(t, "early", alice.event(t, roomID, e.Get("event_id").Str).Get("content.body").Str)
		require.False(t, e.Get("error").Exists())
		e = alice.delayed(t, late)
		require.GreaterOrEqual(t, e.Get("finalised_ts").Int(), before)
		require.False(t, e.Get("event_id").Exists() || e.Get("error").Exists(), e)
		require.Equal(t, http.StatusNotFound, bob.do(t, http.MethodGet, stableDelayed+"/"+late, nil).Code)
	}
}

func testDelayedOrder(t *testing.T, alice, _ *user, roomID string) {
	follower := alice.follow(t, roomID)
	const n = 10
	var want []string
	for i := range n {
		alice.delayMessage(t, roomID, 1500*time.Millisecond, fmt.Sprint("order", i))
		want = append(want, fmt.Sprint("order", i))
	}
	first := alice.delayState(t, roomID, "order", 1500*time.Millisecond, JSON{"body": "first"})
	second := alice.delayState(t, roomID, "order", 1500*time.Millisecond, JSON{"body": "second"})
	follower.await(t, "the last", withBody("second"))
	var got []string
	for _, e := range alice.timeline(t, roomID) {
		if body := e.Get("content.body").Str; strings.HasPrefix(body, "order") || body == "first" || body == "second" {
			got = append(got, body)
		}
	}
	require.Equal(t, append(want, "first", "second"), got)
	require.NotEqual(t, alice.finalised(t, first).Get("event_id").Str, alice.finalised(t, second).Get("event_id").Str)
	require.Equal(t, "second", alice.state(t, roomID, "order").Get("content.body").Str)
}

func testRefusedWhenSent(t *testing.T, alice, bob *user, roomID string) {
	name := "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) + "/state/m.room.name/"
	// The event can be scheduled, because its sender's power is checked only when it is sent.
	id := delayID(t, bob.must(t, http.MethodPut, name+delayParameter+"3600000", JSON{"name": "bob's"}))
	for _, path := range []string{unstableDelayed, stableDelayed} {
		res := bob.actDelayed(t, path, id, "send")
		require.Equal(t, http.StatusForbidden, res.Code, res)
		require.Equal(t, "M_FORBIDDEN", res.Get("errcode").Str)
	}
	require.Equal(t, []string{id}, bob.scheduled(t), "it stays")
	bob.acted(t, unstableDelayed, id, "cancel")

	id = delayID(t, bob.must(t, http.MethodPut, name+delayParameter+"1", JSON{"name": "bob's"}))
	e := bob.finalised(t, id)
	require.Equal(t, "M_FORBIDDEN", e.Get("error.errcode").Str, e)
	require.False(t, e.Get("event_id").Exists())
	require.Equal(t, http.StatusNotFound, bob.actDelayed(t, unstableDelayed, id, "send").Code)
	require.Equal(t, http.StatusConflict, bob.actDelayed(t, stableDelayed, id, "send").Code)
	require.Equal(t, http.StatusNotFound, alice.do(t, http.MethodGet, name, nil).Code)

	// The opposite case: the sender gets the power after scheduling.
	id = delayID(t, bob.must(t, http.MethodPut, name+delayParameter+"3600000", JSON{"name": "bob's"}))
	alice.levels(t, roomID, func(levels map[string]any) { levels["users"].(map[string]any)[bob.UserID] = 50 })
	bob.acted(t, unstableDelayed, id, "send")
	require.Equal(t, "bob's", alice.must(t, http.MethodGet, name, nil).Get("name").Str)
}

func testDelayedReplaced(t *testing.T, alice, bob *user, roomID string) {
	set := func(u *user, body string) {
		u.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "replaced"), JSON{"body": body})
	}
	set(bob, "before")
	id := alice.delayState(t, roomID, "replaced", time.Hour, JSON{"body": "delayed"})
	message := alice.delayMessage(t, roomID, time.Hour, "message")
	alice.acted(t, unstableDelayed, id, "restart") // neither earlier state nor the owner's own state cancels the event
	set(alice, "join")
	alice.acted(t, unstableDelayed, id, "restart")
	bob.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "other"), JSON{"body": "other"})
	alice.acted(t, unstableDelayed, id, "restart")
	set(bob, "after")
	require.Equal(t, http.StatusNotFound, alice.actDelayed(t, unstableDelayed, id, "restart").Code, "by the time that the other has his answer")
	e := alice.finalised(t, id)
	require.False(t, e.Get("event_id").Exists() || e.Get("error").Exists(), "cancelled: %s", e)
	require.Equal(t, []string{message}, alice.scheduled(t))
	require.Equal(t, "after", alice.state(t, roomID, "replaced").Get("content.body").Str)
	alice.acted(t, unstableDelayed, message, "cancel")
}

func testDelayedExpires(t *testing.T, alice, _ *user, roomID string) {
	id := alice.delayState(t, roomID, "expires", time.Second, JSON{"m.will_expire": 2, "body": "x"})
	require.EqualValues(t, 2, alice.delayed(t, id).Get(`content.m\.will_expire`).Int(), "as it was written")
	e := alice.finalised(t, id)
	running := alice.event(t, roomID, e.Get("event_id").Str)
	require.Equal(t, "running", running.Get(`content.m\.will_expire`).Str)
	closing := alice.follow(t, roomID).awaitClosing(t, e.Get("event_id").Str, "expired")
	require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), running.Get("origin_server_ts").Int()+2000, "early")
	require.EqualValues(t, 2, alice.delayed(t, id).Get(`content.m\.will_expire`).Int())

	// The room already has expiring state with this key. The new event still gets its full life, counted from its send.
	life := patience.Life(3)
	first := alice.sendState(t, roomID, "again", life, nil)
	id = alice.delayState(t, roomID, "again", time.Duration(life-2)*time.Second, JSON{"m.will_expire": 4})
	again := alice.event(t, roomID, alice.finalised(t, id).Get("event_id").Str)
	require.NotEqual(t, first.eventID, again.Get("event_id").Str)
	closing = alice.follow(t, roomID).awaitClosing(t, again.Get("event_id").Str, "expired")
	require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), again.Get("origin_server_ts").Int()+4000, "early")
	require.Empty(t, alice.closings(t, roomID, first.eventID))
}

// testDelayedSameState: if the room already has the same state, Dendrite answers with the existing event.
func testDelayedSameState(t *testing.T, alice, _ *user, roomID string) {
	res := alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "same"), JSON{"body": "same"})
	id := alice.delayState(t, roomID, "same", time.Millisecond, JSON{"body": "same"})
	require.Equal(t, res.Get("event_id").Str, alice.finalised(t, id).Get("event_id").Str)
}

func testDelayedOfGuest(t *testing.T, alice, _ *user, _ string) {
	roomID, err := alice.CreateRoom(t.Context(), JSON{"initial_state": []JSON{
		{"type": "m.room.guest_access", "state_key": "", "content": JSON{"guest_access": "can_join"}},
	}})
	require.NoError(t, err)
	client, err := alice.s.RegisterGuest(t.Context())
	require.NoError(t, err)
	guest := &user{client, alice.s}
	require.NoError(t, guest.Join(t.Context(), roomID))
	id := guest.delayState(t, roomID, "guest", time.Hour, JSON{"body": "guest"})
	require.Equal(t, []string{id}, guest.scheduled(t))
	guest.acted(t, stableDelayed, id, "send")
	require.Equal(t, "guest", alice.state(t, roomID, "guest").Get("content.body").Str)
}

func testDelayedTimestamp(t *testing.T, alice, _ *user, roomID string) {
	id := delayID(t, alice.must(t, http.MethodPut,
		homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1&ts=1600000000000", JSON{"body": "old"}))
	e := alice.event(t, roomID, alice.finalised(t, id).Get("event_id").Str)
	require.EqualValues(t, 1600000000000, e.Get("origin_server_ts").Int())
}

// testDelayedMembership: a user who has left cannot send the event, but can after coming back.
func testDelayedMembership(t *testing.T, _, bob *user, roomID string) {
	message := bob.delayMessage(t, roomID, time.Hour, "message")
	short := bob.delayMessage(t, roomID, time.Duration(patience.Life(2))*time.Second, "short")
	bob.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/leave", JSON{})
	require.Equal(t, http.StatusForbidden, bob.actDelayed(t, unstableDelayed, message, "send").Code)
	require.Equal(t, "M_FORBIDDEN", bob.finalised(t, short).Get("error.errcode").Str)
	require.NoError(t, bob.Join(t.Context(), roomID))
	bob.acted(t, unstableDelayed, message, "send")
}

func TestDelayedLimits(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, delayedLimits(JSON{
		"max_scheduled_per_user": 2, "max_delay": "1h", "max_finalised_per_user": 3, "keep_finalised": "1h",
	}), func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		short := alice.delayMessage(t, roomID, time.Minute, "short")
		alice.delayMessage(t, roomID, time.Hour, "long")
		alice.sendMessage(t, roomID, 600) // running events do not count as scheduled
		res := alice.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1000", JSON{})
		require.Equal(t, http.StatusTooManyRequests, res.Code, res)
		require.Equal(t, "M_LIMIT_EXCEEDED", res.Get("errcode").Str)
		after, err := strconv.Atoi(res.Header.Get("Retry-After"))
		require.NoError(t, err)
		require.InDelta(t, 45, after, 15.9, "until the next one is due")
		require.InDelta(t, 1000*after, res.Get("retry_after_ms").Int(), 1000)
		bob.delayMessage(t, roomID, time.Minute, "bob's")
		alice.acted(t, unstableDelayed, short, "cancel")
		alice.delayMessage(t, roomID, time.Minute, "another")

		res = alice.do(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "x")+delayParameter+"3600001", JSON{})
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

func TestDelayedEventsSwitchedOff(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{Expiration: delayedLimits(JSON{"max_scheduled_per_user": 0})})
	alice := s.newUser(t)
	res := alice.do(t, http.MethodPut, homeserver.SendPath(s.room(t, alice), "m.room.message")+delayParameter+"1000", JSON{})
	require.Equal(t, http.StatusForbidden, res.Code, res)
	require.Equal(t, "M_FORBIDDEN", res.Get("errcode").Str)
	features := alice.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get("unstable_features")
	require.False(t, features.Get(`org\.matrix\.msc4140`).Exists(), "clients are told")
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

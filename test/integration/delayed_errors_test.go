package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// The errors of docs/delayed-events.md, in each form and on each path.

// The paths of the dedicated form up to the room ID.
const (
	stableRooms   = "/_matrix/client/v3/rooms/"
	unstableRooms = "/_matrix/client/unstable/org.matrix.msc4140/rooms/"
)

// dedicatedPath returns a path of the dedicated form with a new transaction ID.
func dedicatedPath(rooms, roomID, eventType string) string {
	path := strings.Replace(homeserver.SendPath(roomID, eventType), stableRooms, rooms, 1)
	return strings.Replace(path, "/send/", "/delayed_event/", 1)
}

// clientRequest is a request of a user.
type clientRequest struct {
	method, path string
	body         any
	anonymous    bool // it has no access token
}

// try makes a request, whatever is answered.
func (u *user) try(t *testing.T, r clientRequest) homeserver.Response {
	t.Helper()
	if r.anonymous {
		u = &user{u.s.Anonymous(), u.s}
	}
	return u.do(t, r.method, r.path, r.body)
}

// schedulings returns a request for each form of scheduling.
func schedulings(roomID string, delay time.Duration) map[string]clientRequest {
	body := JSON{"delay_ms": delay.Milliseconds(), "content": JSON{"body": "x"}}
	return map[string]clientRequest{
		"message":            {http.MethodPut, homeserver.SendPath(roomID, "m.room.message") + delayParameter + ms(delay), JSON{"body": "x"}, false},
		"state":              {http.MethodPut, homeserver.StatePath(roomID, memberType, "x") + delayParameter + ms(delay), JSON{"body": "x"}, false},
		"dedicated":          {http.MethodPut, dedicatedPath(stableRooms, roomID, "m.room.message"), body, false},
		"dedicated unstable": {http.MethodPut, dedicatedPath(unstableRooms, roomID, "m.room.message"), body, false},
	}
}

// actions returns a request for each path on which an action can be performed.
func actions(delayID, action string) map[string]clientRequest {
	stable, unstable := stableDelayed+"/"+delayID, unstableDelayed+"/"+delayID
	return map[string]clientRequest{
		action + " unstable":             {http.MethodPost, unstable + "/" + action, nil, true},
		action + " unstable, with token": {http.MethodPost, unstable + "/" + action, nil, false},
		action + " in body":              {http.MethodPost, unstable, JSON{"action": action}, true},
		action + " in body, with token":  {http.MethodPost, unstable, JSON{"action": action}, false},
		action + " stable":               {http.MethodPost, stable + "/" + action, nil, false},
	}
}

// lookups returns a request for each look-up of an event, and one for the list.
func lookups(delayID string) map[string]clientRequest {
	return map[string]clientRequest{
		"look up":           {http.MethodGet, stableDelayed + "/" + delayID, nil, false},
		"look up, unstable": {http.MethodGet, unstableDelayed + "/" + delayID, nil, false},
		"list":              {http.MethodGet, unstableDelayed, nil, false},
	}
}

// requireError requires that a request was refused in a certain way.
func requireError(t *testing.T, res homeserver.Response, code int, errcode string, what ...any) {
	t.Helper()
	require.Equal(t, code, res.Code, "%v: %s", what, res)
	require.Equal(t, errcode, res.Get("errcode").Str, "%v: %s", what, res)
	require.NotEmpty(t, res.Get("error").Str, "%v: %s", what, res)
}

// requireLimited requires that a request was refused because of a limit, with both hints when to try again.
func requireLimited(t *testing.T, res homeserver.Response, what ...any) {
	t.Helper()
	requireError(t, res, http.StatusTooManyRequests, "M_LIMIT_EXCEEDED", what...)
	after := res.Get("retry_after_ms").Int()
	require.Positive(t, after, "%v: %s", what, res)
	require.Equal(t, fmt.Sprint((after+999)/1000), res.Header.Get("Retry-After"), "%v: %s", what, res)
}

// testDedicatedBadRequests is testDelayedBadRequests for the dedicated form.
func testDedicatedBadRequests(t *testing.T, alice, bob *user, roomID string) {
	const day = 24 * 60 * 60 * 1000
	stranger, expired := alice.s.newUser(t), &user{&homeserver.Client{URL: alice.s.URL, Token: "expired"}, alice.s}
	content := func(content any) JSON { return JSON{"delay_ms": 1000, "content": content} }
	delay := func(delay any) JSON { return JSON{"delay_ms": delay, "content": JSON{}} }
	stateKey := func(key any) JSON { return JSON{"delay_ms": 1000, "content": JSON{}, "state_key": key} }
	for rooms, tooLong := range map[string]string{
		stableRooms: "M_DELAY_TOO_LARGE", "/_matrix/client/r0/rooms/": "M_DELAY_TOO_LARGE", unstableRooms: "ORG.MATRIX.MSC4140_DELAY_TOO_LARGE",
	} {
		for name, test := range map[string]struct {
			u                *user
			eventType, query string
			body             any
			code             int
			errcode          string
		}{
			"no token":            {&user{alice.s.Anonymous(), alice.s}, "m.x", "", delay(1000), 401, "M_MISSING_TOKEN"},
			"expired token":       {expired, "m.x", "", delay(1000), 401, "M_UNKNOWN_TOKEN"},
			"no body":             {alice, "m.x", "", nil, 400, "M_NOT_JSON"},
			"not JSON":            {alice, "m.x", "", []byte("{"), 400, "M_NOT_JSON"},
			"not UTF-8":           {alice, "m.x", "", []byte("{\"content\":{},\"delay_ms\":1,\"x\":\"\xff\"}"), 400, "M_NOT_JSON"},
			"no object":           {alice, "m.x", "", []byte("[]"), 400, "M_BAD_JSON"},
			"malformed query":     {alice, "m.x", "?ts=%zz", delay(1000), 400, "M_INVALID_PARAM"},
			"no delay":            {alice, "m.x", "", JSON{"content": JSON{}}, 400, "M_MISSING_PARAM"},
			"delay in other case": {alice, "m.x", "", JSON{"Delay_MS": 1000, "content": JSON{}}, 400, "M_MISSING_PARAM"},
			"zero":                {alice, "m.x", "", delay(0), 400, "M_INVALID_PARAM"},
			"negative":            {alice, "m.x", "", delay(-1), 400, "M_INVALID_PARAM"},
			"no integer":          {alice, "m.x", "", delay(1.5), 400, "M_INVALID_PARAM"},
			"text":                {alice, "m.x", "", delay("1000"), 400, "M_INVALID_PARAM"},
			"null":                {alice, "m.x", "", delay(nil), 400, "M_INVALID_PARAM"},
			"too long":            {alice, "m.x", "", delay(day + 1), 400, tooLong},
			"beyond all numbers":  {alice, "m.x", "", []byte(`{"content":{},"delay_ms":99999999999999999999}`), 400, tooLong},
			"no content":          {alice, "m.x", "", JSON{"delay_ms": 1000}, 400, "M_MISSING_PARAM"},
			"content text":        {alice, "m.x", "", content("x"), 400, "M_BAD_JSON"},
			"content null":        {alice, "m.x", "", content(nil), 400, "M_BAD_JSON"},
			"content too deep":    {alice, "m.x", "", content(json.RawMessage(deep(200))), 400, "M_BAD_JSON"},
			"large content":       {alice, "m.x", "", content(JSON{"x": strings.Repeat("x", 70_000)}), 413, "M_TOO_LARGE"},
			"large body":          {alice, "m.x", "", content(JSON{"x": strings.Repeat("x", 300_000)}), 413, "M_TOO_LARGE"},
			"bad life time":       {alice, "m.x", "", content(JSON{"m.will_expire": -1}), 400, "M_INVALID_PARAM"},
			"key number":          {alice, "m.x", "", stateKey(1), 400, "M_BAD_JSON"},
			"key null":            {alice, "m.x", "", stateKey(nil), 400, "M_BAD_JSON"},
			"sticky":              {alice, "m.x", "?sticky_duration_ms=1000", delay(1000), 400, "M_INVALID_PARAM"},
			"sticky, unstable":    {alice, "m.x", "?org.matrix.msc4354.sticky_duration_ms=1000", delay(1000), 400, "M_INVALID_PARAM"},
			"no power":            {bob, "m.room.name", "", stateKey(""), 403, "M_FORBIDDEN"},
			"not joined":          {stranger, "m.x", "", delay(1000), 403, "M_FORBIDDEN"},
		} {
			t.Run(strings.Trim(strings.TrimPrefix(rooms, "/_matrix/client/"), "/")+" "+name, func(t *testing.T) {
				res := test.u.do(t, http.MethodPut, dedicatedPath(rooms, roomID, test.eventType)+test.query, test.body)
				requireError(t, res, test.code, test.errcode)
				want := map[bool]int64{true: day}[strings.HasPrefix(test.errcode, "ORG.")]
				require.Equal(t, want, res.Get(`org\.matrix\.msc4140\.max_delay`).Int(), res)
			})
		}
		requireError(t, alice.do(t, http.MethodPut, dedicatedPath(rooms, "!nowhere:localhost", "m.x"), delay(1000)), 403, "M_FORBIDDEN")
	}
	require.Empty(t, alice.scheduled(t), "nothing came of any of them")
	require.Empty(t, bob.scheduled(t))
}

// testBadActions: requests that manage or look up, and are refused whatever has become of the event.
func testBadActions(t *testing.T, alice, bob *user, roomID string) {
	id, unknown := alice.delayMessage(t, roomID, time.Hour, "x"), strings.Repeat("x", tokenLength)
	nobody, expired := alice.s.Anonymous(), &homeserver.Client{URL: alice.s.URL, Token: "expired"}
	for _, action := range []string{"restart", "send", "cancel"} {
		for what, r := range actions(unknown, action) {
			requireError(t, alice.try(t, r), 404, "M_NOT_FOUND", what, "of an unknown event")
		}
		for what, r := range actions(id, action) {
			if !r.anonymous {
				requireError(t, bob.try(t, r), 404, "M_NOT_FOUND", what, "of another user's event")
			}
		}
	}
	for what, r := range lookups(unknown) {
		if what != "list" {
			requireError(t, alice.try(t, r), 404, "M_NOT_FOUND", what)
		}
	}
	for what, r := range lookups(id) {
		if what != "list" {
			requireError(t, bob.try(t, r), 404, "M_NOT_FOUND", what)
		}
		requireError(t, (&user{nobody, alice.s}).try(t, r), 401, "M_MISSING_TOKEN", what)
		requireError(t, (&user{expired, alice.s}).try(t, r), 401, "M_UNKNOWN_TOKEN", what)
	}
	stable, unstable := stableDelayed+"/"+id, unstableDelayed+"/"+id
	for _, test := range []struct {
		client  *homeserver.Client
		path    string
		body    any
		code    int
		errcode string
	}{
		{nobody, stable + "/restart", nil, 401, "M_MISSING_TOKEN"},
		{nobody, stable + "/send", nil, 401, "M_MISSING_TOKEN"},
		{nobody, stable + "/cancel", nil, 401, "M_MISSING_TOKEN"},
		{nobody, stable + "/unsend", nil, 401, "M_MISSING_TOKEN"},
		{expired, stable + "/cancel", nil, 401, "M_UNKNOWN_TOKEN"},
		{alice.Client, stable + "/unsend", nil, 404, "M_UNRECOGNIZED"},
		{nobody, unstable + "/unsend", nil, 404, "M_UNRECOGNIZED"},
		{alice.Client, unstable + "/unsend", nil, 404, "M_UNRECOGNIZED"},
		// matrix-js-sdk goes on to the form with the action in the body when the other one is not recognised, but not the other way round.
		{nobody, unstable, JSON{"action": "unsend"}, 400, "M_INVALID_PARAM"},
		{nobody, unstable, JSON{}, 400, "M_MISSING_PARAM"},
		{nobody, unstable, JSON{"action": 1}, 400, "M_MISSING_PARAM"},
		{nobody, unstable, JSON{"action": nil}, 400, "M_MISSING_PARAM"},
		{nobody, unstable, []byte(`["cancel"]`), 400, "M_BAD_JSON"},
		{nobody, unstable, []byte("cancel"), 400, "M_NOT_JSON"},
		{nobody, unstable, []byte("{\"action\":\"cancel\",\"x\":\"\xff\"}"), 400, "M_NOT_JSON"},
		{nobody, unstable, nil, 400, "M_NOT_JSON"},
		{nobody, unstable, JSON{"action": "cancel", "x": strings.Repeat("x", 5000)}, 413, "M_TOO_LARGE"},
		{alice.Client, stable, JSON{"action": "cancel"}, 405, "M_UNRECOGNIZED"},
		{alice.Client, stable, []byte("cancel"), 405, "M_UNRECOGNIZED"},
		{alice.Client, stable, JSON{"action": "cancel", "x": strings.Repeat("x", 5000)}, 405, "M_UNRECOGNIZED"},
	} {
		requireError(t, (&user{test.client, alice.s}).do(t, http.MethodPost, test.path, test.body), test.code, test.errcode, test.path, test.body)
	}
	require.Equal(t, []string{id}, alice.scheduled(t), "none of them has cancelled the event, or sent it")
	alice.acted(t, stableDelayed, id, "cancel")
}

// Delayed events can be switched off for users. Every form of scheduling is refused then, and clients are told.
func TestDelayedEventsSwitchedOff(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, delayedLimits(JSON{"max_scheduled_per_user": 0}), func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		for form, r := range schedulings(roomID, time.Second) {
			requireError(t, alice.try(t, r), 403, "M_FORBIDDEN", form)
		}
		features := alice.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get("unstable_features")
		require.False(t, features.Get(`org\.matrix\.msc4140`).Exists() || features.Get(`org\.matrix\.msc4140\.stable`).Exists())
		limit := alice.must(t, http.MethodGet, "/_matrix/client/v3/capabilities", nil).Get(`capabilities.m\.delayed_events.max_scheduled`)
		require.Equal(t, "0", limit.Raw)
		for _, e := range alice.timeline(t, roomID) {
			require.False(t, e.Get("content.body").Exists(), "it was sent at once")
		}
	})
}

// A fault of the server's is answered with 500, on every path that needs what has failed. No event is lost, sent twice or finalised because
// of it, and due events are sent when the fault is over.
func TestFaultsOfTheServer(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice := s.newUser(t)
			for name, test := range map[string]func(*testing.T, *faulty){
				"Database": testDatabaseFails, "DatabaseOfTheRoomserver": testRoomserverDatabaseFails, "Roomserver": testRoomserverFails,
			} {
				t.Run(name, func(t *testing.T) {
					roomID := s.room(t, alice)
					f := &faulty{alice, roomID, alice.delayMessage(t, roomID, time.Hour, "kept"), alice.delayMessage(t, roomID, time.Hour, "sent")}
					life := time.Duration(patience.Life(2)) * time.Second
					due := alice.delayMessage(t, roomID, life, "due")
					before := s.metric(t, "dendrite_expiration_closing_retries_total")
					test(t, f)
					require.Equal(t, "due", alice.event(t, roomID, alice.finalised(t, due).Get("event_id").Str).Get("content.body").Str)
					require.Greater(t, s.metric(t, "dendrite_expiration_closing_retries_total"), before, "the fault came too late")
					bodies := map[string]int{}
					for _, e := range alice.timeline(t, roomID) {
						bodies[e.Get("content.body").Str]++
					}
					require.Equal(t, [...]int{1, 1, 0}, [...]int{bodies["due"], bodies["sent"], bodies["kept"]})
					alice.acted(t, unstableDelayed, f.kept, "cancel")
					require.Empty(t, alice.scheduled(t), "nothing came of the requests that failed")
				})
			}
		})
	}
}

// faulty is a room whose server has a fault.
type faulty struct {
	*user
	roomID string
	// kept and sent are delay IDs of events that are not due. The test may have only sent in its room.
	kept, sent string
}

// fails requires that requests are answered as a fault of the server's.
func (f *faulty) fails(t *testing.T, requests ...map[string]clientRequest) {
	t.Helper()
	for _, requests := range requests {
		for what, r := range requests {
			requireError(t, f.try(t, r), 500, "M_UNKNOWN", what)
		}
	}
}

// awaitRetry waits until the attempt to send the due event has failed.
func (f *faulty) awaitRetry(t *testing.T) {
	t.Helper()
	before := f.s.metric(t, "dendrite_expiration_closing_retries_total")
	eventually(t, "an attempt fails", func() bool { return f.s.metric(t, "dendrite_expiration_closing_retries_total") > before })
}

func testDatabaseFails(t *testing.T, f *faulty) {
	cancelled := f.delayMessage(t, f.roomID, time.Hour, "cancelled")
	f.acted(t, unstableDelayed, cancelled, "cancel")
	back := f.s.hideTables(t, "expiration")
	for _, id := range []string{f.kept, f.sent, cancelled, strings.Repeat("x", tokenLength)} {
		f.fails(t, actions(id, "restart"), actions(id, "send"), actions(id, "cancel"), lookups(id))
	}
	f.fails(t, schedulings(f.roomID, time.Millisecond))
	f.awaitRetry(t)
	back()
	for _, id := range []string{f.kept, f.sent} {
		f.acted(t, stableDelayed, id, "restart")
	}
	f.acted(t, stableDelayed, f.sent, "send")
	require.NotContains(t, f.delayed(t, cancelled).Raw, "event_id")
}

func testRoomserverDatabaseFails(t *testing.T, f *faulty) {
	back := f.s.hideTables(t, "roomserver")
	f.fails(t, schedulings(f.roomID, time.Millisecond), actions(f.sent, "send"))
	f.awaitRetry(t)
	for what, r := range actions(f.kept, "restart") { // it takes only our own database, as do look-ups
		require.Equal(t, http.StatusOK, f.try(t, r).Code, what)
	}
	require.False(t, f.delayed(t, f.sent).Get("finalised").Exists())
	back()
	f.acted(t, stableDelayed, f.sent, "send")
}

// testRoomserverFails: the roomserver refuses events that were built, as it does when it is overloaded. They are on their way then.
func testRoomserverFails(t *testing.T, f *faulty) {
	require.NoError(t, f.s.Failpoints(string(failpoint.BeforeInput)+" fail"))
	t.Cleanup(func() { _ = f.s.Failpoints() })
	f.fails(t, actions(f.sent, "send"))
	f.awaitRetry(t)
	for _, action := range []string{"restart", "cancel"} {
		for what, r := range actions(f.sent, action) {
			res := f.try(t, r)
			if strings.HasPrefix(r.path, stableDelayed) {
				requireError(t, res, 409, "M_UNKNOWN", what)
			} else {
				requireError(t, res, 404, "M_NOT_FOUND", what)
			}
		}
	}
	require.False(t, f.delayed(t, f.sent).Get("finalised").Exists(), "it can still fail")
	require.NoError(t, f.s.Failpoints())
	require.NotEmpty(t, f.finalised(t, f.sent).Get("event_id").Str, "nobody has asked again")
}

// hideTables renames the tables of one of the databases, so that every statement of the server's fails. The returned function undoes that,
// as does the end of the test.
func (s *server) hideTables(t *testing.T, name string) (undo func()) {
	t.Helper()
	const hidden = "hidden_"
	ctx := context.WithoutCancel(t.Context())
	rename := func(from, to string) {
		s.database(t, name, func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
			query := "SELECT name FROM sqlite_master WHERE type = 'table'"
			if s.cfg.Postgres != "" {
				query = "SELECT tablename FROM pg_tables"
			}
			db, _, err := cm.Connection(options)
			require.NoError(t, err)
			rows, err := db.QueryContext(ctx, query)
			require.NoError(t, err)
			var tables []string
			for rows.Next() {
				var table string
				require.NoError(t, rows.Scan(&table))
				if strings.HasPrefix(table, from) {
					tables = append(tables, table)
				}
			}
			require.NoError(t, errors.Join(rows.Err(), rows.Close()))
			require.NotEmpty(t, tables)
			for _, table := range tables {
				_, err = db.ExecContext(ctx, "ALTER TABLE "+table+" RENAME TO "+to+strings.TrimPrefix(table, from))
				require.NoError(t, err)
			}
		})
	}
	rename(name+"_", hidden+name+"_")
	undo = sync.OnceFunc(func() { rename(hidden+name+"_", name+"_") })
	t.Cleanup(undo)
	return undo
}

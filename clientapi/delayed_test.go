package clientapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	unstablePath = "/_matrix/client/unstable/org.matrix.msc4140"
	stablePath   = "/_matrix/client/v1"
	delayID      = "9GkC3sQyXbWm0TnRzP4vJ7hLdE1aUoF6iY2cBtKxZ8M"
)

// schedule is a call of Timers.Schedule.
type schedule struct {
	event   expiration.Event
	delayed expiration.Delayed
	delay   time.Duration
}

// planner is a component that writes down what it is told to schedule, and does all else as the test says.
type planner struct {
	Timers
	scheduled []schedule
	before    string // the delay ID that a request was given before
	err       error
	acts      []string
	asked     expiration.Bucket
	events    []expiration.DelayedEvent
	read      int // how many events were read
}

func (p *planner) Scheduled(context.Context, expiration.RequestHash) (string, error) {
	return p.before, nil
}

func (p *planner) Schedule(
	_ context.Context, e expiration.Event, d expiration.Delayed, delay time.Duration, _ bool,
) (string, error) {
	p.scheduled = append(p.scheduled, schedule{e, d, delay})
	return delayID, p.err
}

func (p *planner) AllowDelayed(id string) (known bool, wait time.Duration) {
	if id != delayID {
		return false, 0
	}
	return true, p.asked.Take(twice, time.Hour)
}

func (p *planner) act(action, id, owner string) error {
	p.acts = append(p.acts, action+" "+owner)
	if id != delayID {
		return expiration.ErrNotFound
	}
	return p.err
}

func (p *planner) RestartDelayed(_ context.Context, id, owner string) error {
	return p.act("restart", id, owner)
}
func (p *planner) SendDelayed(_ context.Context, id, owner string) error {
	return p.act("send", id, owner)
}
func (p *planner) CancelDelayed(_ context.Context, id, owner string) error {
	return p.act("cancel", id, owner)
}

func (p *planner) DelayedEvents(_ context.Context, owner, after string) iter.Seq2[expiration.DelayedEvent, error] {
	return func(yield func(expiration.DelayedEvent, error) bool) {
		p.acts = append(p.acts, "list "+owner)
		for _, e := range p.events {
			if e.Place > after || after == "" {
				p.read++
				if !yield(e, p.err) {
					return
				}
			}
		}
	}
}

func (p *planner) DelayedEvent(_ context.Context, id, owner string) (expiration.DelayedEvent, error) {
	if err := p.act("look", id, owner); err != nil {
		return expiration.DelayedEvent{}, err
	}
	return p.events[0], nil
}

// rooms is a roomserver that has one room, with Alice in it.
type rooms struct{ dendrite }

func (rooms) QueryMembershipForUser(
	_ context.Context, req *api.QueryMembershipForUserRequest, res *api.QueryMembershipForUserResponse,
) error {
	res.RoomExists = req.RoomID == "!room:localhost" || req.RoomID == "!left:localhost"
	res.IsInRoom = req.RoomID == "!room:localhost"
	return nil
}

func (rooms) Hooked(req *http.Request, _ *expiration.Hook) (*http.Request, api.ClientRoomserverAPI) {
	return req, rooms{}
}

func (rooms) LockSender(context.Context, string, string) (func(), error) { return func() {}, nil }

func (rooms) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return gomatrixserverlib.RoomVersionV10, nil
}

// twice is how often a delay ID, known or not, may be acted upon in these tests.
var twice = expiration.RateLimit{Threshold: 2, Cooloff: time.Hour}

// newPlanned returns the routes as Dendrite serves them.
func newPlanned(p *planner, maxScheduled int) http.Handler {
	a := New(Config{
		MaxDuration: time.Hour, MaxDelay: 24 * time.Hour, MaxScheduled: maxScheduled,
		UnknownTokens: twice,
	}, &config.ClientAPI{}, rooms{}, p)
	routers := httputil.NewRouters()
	a.AddRoutes(routers.Client, dendrite{})
	return routers.Client
}

// do sends a request, as Alice if it is to have an access token.
func do(handler http.Handler, method, path, body string, authorized bool) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	if authorized {
		req.Header.Set("Authorization", "Bearer token")
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, req)
	return w
}

// errcode returns the code of a Matrix error.
func errcode(w *httptest.ResponseRecorder) string { return gjson.Get(w.Body.String(), "errcode").Str }

// A user's requests are limited together, whatever they ask for, and an application service's are not.
func TestRequestsOfAUserAreLimited(t *testing.T) {
	a := New(Config{MaxDelay: time.Hour, UserRequests: twice}, &config.ClientAPI{}, rooms{}, &planner{})
	alice, bob := &userapi.Device{UserID: "@alice:localhost"}, &userapi.Device{UserID: "@bob:localhost"}
	service := &userapi.Device{UserID: "@alice:localhost", AccountType: userapi.AccountTypeAppService}
	for _, device := range []*userapi.Device{alice, alice, bob, service} {
		done, err := a.begin(httptest.NewRequest(http.MethodGet, "/", nil), device)
		require.NoError(t, err)
		done()
	}
	req := httptest.NewRequest(http.MethodPut, "/?org.matrix.msc4140.delay=1", strings.NewReader("{}"))
	txnID := "txn"
	for name, res := range map[string]util.JSONResponse{
		"schedule": a.send(req, alice, target{roomID: "!room:localhost", eventType: "m", txnID: &txnID}),
		"list":     a.list(req, alice, unstable),
		"look up":  a.look(req, alice, stable, "id"),
	} {
		require.Equal(t, http.StatusTooManyRequests, res.Code, name)
		require.Equal(t, "1800", res.Headers["Retry-After"], name)
	}
}

func TestSchedule(t *testing.T) {
	const (
		query = "/_matrix/client/v3/rooms/!room:localhost/"
		field = query + "delayed_event/m/txn"
		ms    = "?org.matrix.msc4140.delay="
	)
	empty, key := "", "key"
	event := func(stateKey *string) expiration.Event {
		return expiration.Event{RoomID: "!room:localhost", Type: "m", StateKey: stateKey, Sender: "@alice:localhost"}
	}
	content := func(text string) expiration.Delayed { return expiration.Delayed{Content: []byte(text)} }
	for name, test := range map[string]struct {
		method, path, body string
		want               schedule
		requested          bool // the request can be repeated
	}{
		"message":     {"PUT", query + "send/m/txn" + ms + "1", `{"a": 1}`, schedule{event(nil), content(`{"a": 1}`), time.Millisecond}, true},
		"no txn":      {"POST", query + "send/m" + ms + "86400000", `{}`, schedule{event(nil), content(`{}`), 24 * time.Hour}, false},
		"state":       {"PUT", query + "state/m/key" + ms + "8000", `{}`, schedule{event(&key), content(`{}`), 8 * time.Second}, false},
		"empty key":   {"PUT", query + "state/m" + ms + "8000", `{}`, schedule{event(&empty), content(`{}`), 8 * time.Second}, false},
		"escaped":     {"PUT", query + "send/m/txn?org%2Ematrix.msc4140.delay=5", `{}`, schedule{event(nil), content(`{}`), 5 * time.Millisecond}, true},
		"field":       {"PUT", field, `{"delay_ms":5,"content":{ "a":1}}`, schedule{event(nil), content(`{ "a":1}`), 5 * time.Millisecond}, true},
		"field state": {"PUT", field, `{"delay_ms":5,"content":{},"state_key":"key"}`, schedule{event(&key), content(`{}`), 5 * time.Millisecond}, true},
		"field empty": {"PUT", field, `{"delay_ms":5,"content":{},"state_key":""}`, schedule{event(&empty), content(`{}`), 5 * time.Millisecond}, true},
		"field unstable": {
			"PUT", unstablePath + "/rooms/!room:localhost/delayed_event/m/txn", `{"delay_ms":5,"content":{}}`,
			schedule{event(nil), content(`{}`), 5 * time.Millisecond}, true,
		},
		"expiring": {"PUT", field, `{"delay_ms":5,"content":{"m.will_expire":30}}`, schedule{
			event(nil), expiration.Delayed{Content: []byte(`{"m.will_expire":30}`), Expires: 30 * time.Second}, 5 * time.Millisecond,
		}, true},
		"closing": {"PUT", field, `{"delay_ms":5,"content":{"m.will_expire":"ended"}}`, schedule{
			event(nil), content(`{"m.will_expire":"ended"}`), 5 * time.Millisecond,
		}, true},
		"bearing a time": {"PUT", field + "?ts=1700000000123", `{"delay_ms":5,"content":{}}`, schedule{
			event(nil), expiration.Delayed{Content: []byte(`{}`), Timestamp: time.UnixMilli(1_700_000_000_123)}, 5 * time.Millisecond,
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := &planner{}
			w := do(newPlanned(p, 1), test.method, test.path, test.body, true)
			require.Equal(t, http.StatusOK, w.Code, w.Body)
			require.JSONEq(t, `{"delay_id":"`+delayID+`"}`, w.Body.String())
			require.Len(t, p.scheduled, 1)
			got := p.scheduled[0]
			require.Equal(t, test.requested, got.event.Request != nil)
			got.event.Request = nil
			require.True(t, test.want.delayed.Timestamp.Equal(got.delayed.Timestamp))
			got.delayed.Timestamp = test.want.delayed.Timestamp
			require.Equal(t, test.want, got)
			require.Equal(t, http.StatusUnauthorized, do(newPlanned(p, 1), test.method, test.path, test.body, false).Code)
			require.Len(t, p.scheduled, 1)
		})
	}
	large := `{"a":"` + strings.Repeat("x", maxContentSize) + `"}`
	for name, test := range map[string]struct {
		path, body string
		code       int
		errcode    string
	}{
		"delay 0":            {query + "send/m/txn" + ms + "0", `{}`, 400, "M_INVALID_PARAM"},
		"negative delay":     {query + "send/m/txn" + ms + "-1", `{}`, 400, "M_INVALID_PARAM"},
		"no delay":           {query + "send/m/txn" + ms, `{}`, 400, "M_INVALID_PARAM"},
		"fraction":           {query + "send/m/txn" + ms + "1.5", `{}`, 400, "M_INVALID_PARAM"},
		"word":               {query + "state/m/key" + ms + "soon", `{}`, 400, "M_INVALID_PARAM"},
		"too long":           {query + "state/m/key" + ms + "86400001", `{}`, 400, "M_UNKNOWN"},
		"no JSON":            {query + "state/m/key" + ms + "1", `{`, 400, "M_NOT_JSON"},
		"no UTF-8":           {query + "state/m/key" + ms + "1", "{\"a\":\"\xff\"}", 400, "M_NOT_JSON"},
		"array":              {query + "state/m/key" + ms + "1", `[]`, 400, "M_BAD_JSON"},
		"empty":              {query + "state/m/key" + ms + "1", ``, 400, "M_NOT_JSON"},
		"large":              {query + "state/m/key" + ms + "1", large, 413, "M_TOO_LARGE"},
		"not in the room":    {"/_matrix/client/v3/rooms/!left:localhost/send/m/txn" + ms + "1", `{}`, 403, "M_FORBIDDEN"},
		"no room":            {"/_matrix/client/v3/rooms/!none:localhost/send/m/txn" + ms + "1", `{}`, 403, "M_FORBIDDEN"},
		"bad time":           {query + "send/m/txn" + ms + "1&ts=now", `{}`, 400, "M_INVALID_PARAM"},
		"bad duration":       {query + "send/m/txn" + ms + "1", `{"m.will_expire":0}`, 400, "M_INVALID_PARAM"},
		"field 0":            {field, `{"delay_ms":0,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field missing":      {field, `{"content":{}}`, 400, "M_INVALID_PARAM"},
		"field string":       {field, `{"delay_ms":"5","content":{}}`, 400, "M_INVALID_PARAM"},
		"field fraction":     {field, `{"delay_ms":5.0,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field null":         {field, `{"delay_ms":null,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field too long":     {field, `{"delay_ms":86400001,"content":{}}`, 403, "M_FORBIDDEN"},
		"field no content":   {field, `{"delay_ms":5}`, 400, "M_MISSING_PARAM"},
		"field null content": {field, `{"delay_ms":5,"content":null}`, 400, "M_BAD_JSON"},
		"field bad key":      {field, `{"delay_ms":5,"content":{},"state_key":5}`, 400, "M_BAD_JSON"},
		"field null key":     {field, `{"delay_ms":5,"content":{},"state_key":null}`, 400, "M_BAD_JSON"},
		"field no JSON":      {field, `{`, 400, "M_NOT_JSON"},
		"field array":        {field, `[]`, 400, "M_BAD_JSON"},
		"field large":        {field, `{"delay_ms":5,"content":` + large + `}`, 413, "M_TOO_LARGE"},
		"body large":         {field, strings.Repeat(" ", maxScheduleSize+1), 413, "M_TOO_LARGE"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &planner{}
			w := do(newPlanned(p, 1), http.MethodPut, test.path, test.body, true)
			require.Equal(t, test.code, w.Code, w.Body)
			require.Equal(t, test.errcode, errcode(w))
			require.Empty(t, p.scheduled)
			if name == "too long" {
				require.Equal(t, "M_MAX_DELAY_EXCEEDED", gjson.Get(w.Body.String(), `org\.matrix\.msc4140\.errcode`).Str)
				require.EqualValues(t, 86_400_000, gjson.Get(w.Body.String(), `org\.matrix\.msc4140\.max_delay`).Int())
			}
		})
	}
	t.Run("switched off", func(t *testing.T) {
		p := &planner{}
		w := do(newPlanned(p, 0), http.MethodPut, field, `{"delay_ms":5,"content":{}}`, true)
		require.Equal(t, http.StatusForbidden, w.Code)
		require.Equal(t, "M_FORBIDDEN", errcode(w))
		require.Empty(t, p.scheduled)
	})
	t.Run("limit", func(t *testing.T) {
		p := &planner{err: &expiration.LimitError{RetryAfter: 1500*time.Millisecond + time.Microsecond}}
		w := do(newPlanned(p, 1), http.MethodPut, field, `{"delay_ms":5,"content":{}}`, true)
		require.Equal(t, http.StatusTooManyRequests, w.Code)
		require.Equal(t, "M_LIMIT_EXCEEDED", errcode(w))
		require.Equal(t, "2", w.Header().Get("Retry-After"))
		require.EqualValues(t, 1501, gjson.Get(w.Body.String(), "retry_after_ms").Int())
	})
	t.Run("repeated", func(t *testing.T) {
		p := &planner{before: "before"}
		for _, maxScheduled := range []int{0, 1} {
			w := do(newPlanned(p, maxScheduled), http.MethodPut, query+"send/m/txn"+ms+"1", ``, true)
			require.Equal(t, http.StatusOK, w.Code)
			require.JSONEq(t, `{"delay_id":"before"}`, w.Body.String())
		}
		require.Empty(t, p.scheduled)
	})
}

// Delayed and other requests have nothing to do with one another, though the transaction ID be the same.
func TestRequestsOfDelayedEvents(t *testing.T) {
	p := &planner{}
	handler := newPlanned(p, 1)
	const room = "/_matrix/client/v3/rooms/!room:localhost/"
	for _, path := range []string{"send/m/txn?org.matrix.msc4140.delay=5", "send/m/other?org.matrix.msc4140.delay=5", "delayed_event/m/txn"} {
		require.Equal(t, http.StatusOK, do(handler, http.MethodPut, room+path, `{"delay_ms":5,"content":{}}`, true).Code)
	}
	require.Equal(t, p.scheduled[0].event.Request, p.scheduled[2].event.Request)
	require.NotEqual(t, p.scheduled[0].event.Request, p.scheduled[1].event.Request)
	txnID := "txn"
	to := target{roomID: "!room:localhost", eventType: "m", txnID: &txnID}
	require.NotEqual(t, p.scheduled[0].event.Request.Hash, *requestHash(&userapi.Device{UserID: "@alice:localhost"}, to))
	to.delayed = true
	require.Equal(t, p.scheduled[0].event.Request.Hash, *requestHash(&userapi.Device{UserID: "@alice:localhost"}, to))
}

// Where the accepted text and the clients of today disagree, the paths differ.
func TestActions(t *testing.T) {
	sent := &expiration.FinalisedError{Final: expiration.Final{EventID: "$x"}}
	cancelled := &expiration.FinalisedError{}
	failed := &expiration.FinalisedError{Final: expiration.Final{Error: json.RawMessage(`{}`)}}
	refused := &expiration.RefusedError{Code: 403, Response: json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"no"}`)}
	for _, test := range []struct {
		action           string
		err              error
		stable, unstable int
		errcode          [2]string
	}{
		{"restart", nil, 200, 200, [2]string{}},
		{"send", nil, 200, 200, [2]string{}},
		{"cancel", nil, 200, 200, [2]string{}},
		{"restart", sent, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"restart", cancelled, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"restart", failed, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"send", sent, 200, 200, [2]string{}},
		{"send", cancelled, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"send", failed, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"cancel", sent, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"cancel", cancelled, 200, 200, [2]string{}},
		{"cancel", failed, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"send", refused, 403, 403, [2]string{"M_FORBIDDEN", "M_FORBIDDEN"}},
		{"restart", expiration.ErrNotFound, 404, 404, [2]string{"M_NOT_FOUND", "M_NOT_FOUND"}},
		{"restart", errors.New("disk full"), 500, 500, [2]string{"M_UNKNOWN", "M_UNKNOWN"}},
		{"delete", nil, 404, 404, [2]string{"M_UNRECOGNIZED", "M_UNRECOGNIZED"}},
	} {
		check := func(w *httptest.ResponseRecorder, code int, wanted string) {
			t.Helper()
			require.Equal(t, code, w.Code, "%s %v: %s", test.action, test.err, w.Body)
			require.Equal(t, wanted, errcode(w))
			if code == http.StatusOK {
				require.JSONEq(t, `{}`, w.Body.String())
			}
		}
		for _, body := range []string{"", "{}"} {
			p := &planner{err: test.err}
			check(do(newPlanned(p, 1), "POST", stablePath+"/delayed_events/"+delayID+"/"+test.action, body, true), test.stable, test.errcode[0])
			check(do(newPlanned(p, 1), "POST", unstablePath+"/delayed_events/"+delayID+"/"+test.action, body, false), test.unstable, test.errcode[1])
			if test.action != "delete" {
				require.Equal(t, []string{test.action + " @alice:localhost", test.action + " "}, p.acts)
			}
			w := do(newPlanned(p, 1), "POST", stablePath+"/delayed_events/"+delayID+"/"+test.action, body, false)
			require.Equal(t, http.StatusUnauthorized, w.Code)
		}
		body := `{"action":"` + test.action + `"}`
		check(do(newPlanned(&planner{err: test.err}, 1), "POST", unstablePath+"/delayed_events/"+delayID, body, false), test.unstable, test.errcode[1])
	}
	for body, code := range map[string]string{`{}`: "M_MISSING_PARAM", `{"action":5}`: "M_MISSING_PARAM", ``: "M_NOT_JSON", `[]`: "M_BAD_JSON"} {
		w := do(newPlanned(&planner{}, 1), "POST", unstablePath+"/delayed_events/"+delayID, body, false)
		require.Equal(t, http.StatusBadRequest, w.Code)
		require.Equal(t, code, errcode(w))
	}
}

func TestActionsAreLimited(t *testing.T) {
	handler := newPlanned(&planner{}, 1)
	for _, id := range []string{delayID, "guess"} {
		for n := range 3 {
			w := do(handler, "POST", unstablePath+"/delayed_events/"+id+"/restart", "", false)
			require.Equal(t, n == 2, w.Code == http.StatusTooManyRequests, w.Body)
		}
	}
}

func TestLookups(t *testing.T) {
	key := "key"
	scheduled := expiration.DelayedEvent{DelayID: delayID, Timer: expiration.Timer{
		Event:   expiration.Event{ID: "row", RoomID: "!room:localhost", Type: "m", StateKey: &key, Sender: "@alice:localhost"},
		Delayed: &expiration.Delayed{Content: []byte(`{"a":1}`)}, Duration: 8 * time.Second, Deadline: time.UnixMilli(20_000),
	}}
	message := scheduled
	message.Timer.Event.StateKey = nil
	with := func(f expiration.Final) expiration.DelayedEvent {
		d := scheduled
		d.Final = &f
		return d
	}
	const (
		common = `"delay_id":"` + delayID + `","room_id":"!room:localhost","type":"m","content":{"a":1},"delay_ms":8000,"scheduled_at":12000`
		older  = `,"delay":8000,"running_since":12000`
		state  = `,"state_key":"key"`
	)
	at := time.UnixMilli(21_000)
	for want, event := range map[string]expiration.DelayedEvent{
		state:                           scheduled,
		"":                              message,
		state + `,"finalised_ts":21000`: with(expiration.Final{At: at}),
		state + `,"finalised_ts":21000,"event_id":"$x"`:             with(expiration.Final{At: at, EventID: "$x"}),
		state + `,"finalised_ts":21000,"error":{"errcode":"M_BAD"}`: with(expiration.Final{At: at, Error: []byte(`{"errcode":"M_BAD"}`)}),
	} {
		for path, more := range map[string]string{stablePath: "", unstablePath: older} {
			p := &planner{events: []expiration.DelayedEvent{event}}
			for _, body := range []string{"", "{}"} {
				w := do(newPlanned(p, 1), "GET", path+"/delayed_events/"+delayID, body, true)
				require.Equal(t, http.StatusOK, w.Code)
				require.JSONEq(t, "{"+common+more+want+"}", w.Body.String())
				w = do(newPlanned(p, 1), "GET", path+"/delayed_events", body, true)
				require.Equal(t, http.StatusOK, w.Code)
				require.JSONEq(t, `{"delayed_events":[{`+common+more+want+"}]}", w.Body.String())
			}
			require.Equal(t, "look @alice:localhost", p.acts[0])
			require.Equal(t, "list @alice:localhost", p.acts[1])
			for _, id := range []string{"", "/" + delayID} {
				require.Equal(t, http.StatusUnauthorized, do(newPlanned(p, 1), "GET", path+"/delayed_events"+id, "", false).Code)
			}
			w := do(newPlanned(p, 1), "GET", path+"/delayed_events/guess", "", true)
			require.Equal(t, http.StatusNotFound, w.Code)
			require.Equal(t, string(spec.ErrorNotFound), errcode(w))
		}
	}
	w := do(newPlanned(&planner{}, 1), "GET", stablePath+"/delayed_events", "", true)
	require.JSONEq(t, `{"delayed_events":[]}`, w.Body.String())
}

// Browsers ask before each request whether they may send it.
func TestPreflights(t *testing.T) {
	for _, path := range []string{
		"/_matrix/client/v3/rooms/!room:localhost/delayed_event/m/txn", unstablePath + "/rooms/!room:localhost/delayed_event/m/txn",
		stablePath + "/delayed_events", stablePath + "/delayed_events/" + delayID, stablePath + "/delayed_events/" + delayID + "/send",
		unstablePath + "/delayed_events", unstablePath + "/delayed_events/" + delayID, unstablePath + "/delayed_events/" + delayID + "/send",
	} {
		p := &planner{}
		w := do(newPlanned(p, 1), http.MethodOptions, path, "", false)
		require.Equal(t, http.StatusOK, w.Code, path)
		require.Equal(t, "*", w.Header().Get("Access-Control-Allow-Origin"), path)
		require.Empty(t, p.acts)
	}
}

// The delay ID is authority enough for whoever has it, and belongs into no log.
func TestDelayIDsAreNotLogged(t *testing.T) {
	var log strings.Builder
	defer logrus.SetLevel(logrus.GetLevel())
	defer logrus.SetOutput(logrus.StandardLogger().Out)
	logrus.SetOutput(&log)
	logrus.SetLevel(logrus.TraceLevel)
	p := &planner{err: errors.New("disk full")}
	for _, path := range []string{stablePath, unstablePath} {
		events := path + "/delayed_events/" + delayID
		do(newPlanned(p, 1), "POST", events+"/restart", "{}", true)
		do(newPlanned(p, 1), "POST", events, `{"action":"restart"}`, true)
		do(newPlanned(p, 1), "GET", events, "", true)
		do(newPlanned(p, 1), "GET", path+"/delayed_events?delay_id="+delayID, "", true)
		do(newPlanned(p, 1), "POST", events+"/"+delayID, "{}", true)
		do(newPlanned(p, 1), "POST", path+"/delayed_events/restart/"+delayID, "{}", true)
		// However it is spelled.
		spelled := path + "/delayed_events/" + fmt.Sprintf("%%%02x", delayID[0]) + delayID[1:]
		for _, action := range []string{"/restart", "/rest%61rt", ""} {
			do(newPlanned(p, 1), "POST", spelled+action, `{"action":"restart"}`, true)
			do(newPlanned(p, 1), "GET", spelled+action, "", true)
			do(newPlanned(p, 1), "OPTIONS", spelled+action, "", true)
		}
	}
	logrus.SetOutput(io.Discard)
	require.Contains(t, log.String(), "disk full")
	require.NotContains(t, log.String(), delayID[1:])
}

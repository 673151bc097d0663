package clientapi

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

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
		"a user's time": {"PUT", field + "?ts=1700000000123", `{"delay_ms":5,"content":{}}`, schedule{
			event(nil), content(`{}`), 5 * time.Millisecond,
		}, true},
		"enough power": {"PUT", "/_matrix/client/v3/rooms/!powers:localhost/send/m.low/txn" + ms + "1", `{}`, schedule{
			expiration.Event{RoomID: "!powers:localhost", Type: "m.low", Sender: "@alice:localhost"}, content(`{}`), time.Millisecond,
		}, true},
		"enough power for state": {"PUT", "/_matrix/client/v3/rooms/!powers:localhost/state/m/key" + ms + "1", `{}`, schedule{
			expiration.Event{RoomID: "!powers:localhost", Type: "m", StateKey: &key, Sender: "@alice:localhost"}, content(`{}`), time.Millisecond,
		}, false},
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
		"two delays":         {query + "send/m/txn" + ms + "1&org%2Ematrix.msc4140.delay=2", `{}`, 400, "M_INVALID_PARAM"},
		"word":               {query + "state/m/key" + ms + "soon", `{}`, 400, "M_INVALID_PARAM"},
		"too long":           {query + "state/m/key" + ms + "86400001", `{}`, 400, "M_UNKNOWN"},
		"no JSON":            {query + "state/m/key" + ms + "1", `{`, 400, "M_NOT_JSON"},
		"no UTF-8":           {query + "state/m/key" + ms + "1", "{\"a\":\"\xff\"}", 400, "M_NOT_JSON"},
		"array":              {query + "state/m/key" + ms + "1", `[]`, 400, "M_BAD_JSON"},
		"empty":              {query + "state/m/key" + ms + "1", ``, 400, "M_NOT_JSON"},
		"large":              {query + "state/m/key" + ms + "1", large, 413, "M_TOO_LARGE"},
		"not in the room":    {"/_matrix/client/v3/rooms/!left:localhost/send/m/txn" + ms + "1", `{}`, 403, "M_FORBIDDEN"},
		"no room":            {"/_matrix/client/v3/rooms/!none:localhost/send/m/txn" + ms + "1", `{}`, 403, "M_FORBIDDEN"},
		"no power":           {"/_matrix/client/v3/rooms/!powers:localhost/send/m/txn" + ms + "1", `{}`, 403, "M_FORBIDDEN"},
		"no power for state": {"/_matrix/client/v3/rooms/!powers:localhost/state/m.high/key" + ms + "1", `{}`, 403, "M_FORBIDDEN"},
		"sticky":             {query + "send/m/txn" + ms + "1&org.matrix.msc4354.sticky_duration_ms=1000", `{}`, 400, "M_INVALID_PARAM"},
		"malformed":          {query + "send/m/txn?org%2Ematrix.msc4140.delay=%zz", `{}`, 400, "M_INVALID_PARAM"},
		"malformed state":    {query + "state/m/key?org.matrix.msc4140.delay=1;", `{}`, 400, "M_INVALID_PARAM"},
		"malformed sticky":   {query + "send/m/txn" + ms + "1&sticky%5Fduration_ms=%zz", `{}`, 400, "M_INVALID_PARAM"},
		"field malformed":    {field + "?sticky_duration_ms=%zz", `{"delay_ms":5,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field sticky":       {field + "?sticky_duration_ms=1000", `{"delay_ms":5,"content":{}}`, 400, "M_INVALID_PARAM"},
		"bad duration":       {query + "send/m/txn" + ms + "1", `{"m.will_expire":0}`, 400, "M_INVALID_PARAM"},
		"field 0":            {field, `{"delay_ms":0,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field missing":      {field, `{"content":{}}`, 400, "M_MISSING_PARAM"},
		"field string":       {field, `{"delay_ms":"5","content":{}}`, 400, "M_INVALID_PARAM"},
		"field fraction":     {field, `{"delay_ms":5.0,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field null":         {field, `{"delay_ms":null,"content":{}}`, 400, "M_INVALID_PARAM"},
		"field too long":     {field, `{"delay_ms":86400001,"content":{}}`, 400, "M_DELAY_TOO_LARGE"},
		"unstable too long": {
			unstablePath + "/rooms/!room:localhost/delayed_event/m/txn", `{"delay_ms":86400001,"content":{}}`, 400,
			"ORG.MATRIX.MSC4140_DELAY_TOO_LARGE",
		},
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
			}
			if name == "too long" || name == "unstable too long" {
				require.EqualValues(t, 86_400_000, gjson.Get(w.Body.String(), `org\.matrix\.msc4140\.max_delay`).Int())
			}
		})
	}
	t.Run("a service's time", func(t *testing.T) {
		for ts, code := range map[string]int{"1700000000123": 200, "0": 200, "now": 400, "-1": 400, "9223372036855": 400} {
			p := &planner{}
			w := doWith(newPlanned(p, 1), http.MethodPut, field+"?ts="+ts, `{"delay_ms":5,"content":{}}`, "service")
			require.Equal(t, code, w.Code, w.Body)
			if code == http.StatusOK {
				require.Equal(t, ts, fmt.Sprint(p.scheduled[0].delayed.Timestamp.UnixMilli()))
			} else {
				require.Equal(t, "M_INVALID_PARAM", errcode(w))
			}
		}
		p := &planner{}
		w := doWith(newPlanned(p, 1), http.MethodPut, field+"?ts=", `{"delay_ms":5,"content":{}}`, "service")
		require.Equal(t, http.StatusOK, w.Code, w.Body)
		require.Zero(t, p.scheduled[0].delayed.Timestamp, "as without ts")
	})
	t.Run("a service's user without a server", func(t *testing.T) {
		for _, path := range []string{query + "send/m/txn" + ms + "1&", query + "send/m/txn?", field + "?"} {
			p := &planner{}
			w := doWith(newPlanned(p, 1), http.MethodPut, path+"user_id=alice", `{"delay_ms":5,"content":{}}`, "service")
			require.Equal(t, http.StatusBadRequest, w.Code, w.Body)
			require.Equal(t, "M_BAD_JSON", errcode(w))
			require.Empty(t, p.scheduled)
		}
	})
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

// A request that schedules and an ordinary send are different requests, even with the same transaction ID.
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

// Browsers send a CORS preflight request before each request, and it must succeed without a login.
func TestPreflights(t *testing.T) {
	for _, path := range []string{
		"/_matrix/client/v3/rooms/!room:localhost/delayed_event/m/txn", unstablePath + "/rooms/!room:localhost/delayed_event/m/txn",
		stablePath + "/delayed_events/" + delayID, stablePath + "/delayed_events/" + delayID + "/send",
		unstablePath + "/delayed_events", unstablePath + "/delayed_events/" + delayID, unstablePath + "/delayed_events/" + delayID + "/send",
	} {
		p := &planner{}
		w := do(newPlanned(p, 1), http.MethodOptions, path, "", false)
		require.Equal(t, http.StatusOK, w.Code, path)
		require.Equal(t, "*", w.Header().Get("Access-Control-Allow-Origin"), path)
		require.Empty(t, p.acts)
	}
}

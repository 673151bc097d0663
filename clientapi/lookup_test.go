package clientapi

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The list has pages of bounded size. For a page, at most one event more than the page has is read; it shows that there is another page.
func TestPages(t *testing.T) {
	for size, perPage := range map[int]int{60_000: 5, 100: 100} {
		p := &planner{}
		content := `{"a":"` + strings.Repeat("x", size) + `"}`
		for i := range 100 {
			p.events = append(p.events, expiration.DelayedEvent{
				DelayID: fmt.Sprint(i), Place: fmt.Sprintf("%03d", i),
				Timer: expiration.Timer{
					Event: expiration.Event{RoomID: "!r:x", Type: "m"}, Delayed: &expiration.Delayed{Content: []byte(content)},
				},
			})
		}
		handler := newPlanned(p, 1)
		var seen []string
		for from, pages := "", 1; ; pages++ {
			p.read = 0
			path := unstablePath + "/delayed_events?status=scheduled"
			if from != "" {
				path += "&from=" + url.QueryEscape(from)
			}
			w := do(handler, http.MethodGet, path, "", true)
			require.Equal(t, http.StatusOK, w.Code)
			require.Less(t, w.Body.Len(), maxPageSize+maxContentSize+perPage*delayedEventSize)
			events := gjson.Get(w.Body.String(), "delayed_events").Array()
			require.Len(t, events, perPage)
			require.LessOrEqual(t, p.read, perPage+1)
			for _, e := range events {
				seen = append(seen, e.Get("delay_id").Str)
			}
			if from = gjson.Get(w.Body.String(), "next_batch").Str; from == "" {
				require.Equal(t, 100/perPage, pages)
				break
			}
		}
		require.Len(t, seen, 100)
		require.Equal(t, "99", seen[99])
	}
}

// A state key is shown as the client gave it. In rooms with pseudo IDs, the event has a user's key instead of the user's ID.
func TestStateKeysInLookups(t *testing.T) {
	for version, shown := range map[gomatrixserverlib.RoomVersion]map[string]string{
		"10":      {"key of bob": "key of bob", "": ""},
		pseudoIDs: {"key of bob": "@bob:localhost", "": ""},
	} {
		a := &API{rsAPI: versioned{version: version}}
		for key, want := range shown {
			got := a.givenStateKey(t.Context(), expiration.Event{RoomID: "!room:localhost", StateKey: &key})
			require.Equal(t, want, *got, version)
		}
		require.Nil(t, a.givenStateKey(t.Context(), expiration.Event{RoomID: "!room:localhost"}))
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
		common = `"delay_id":"` + delayID + `","room_id":"!room:localhost","type":"m","content":{"a":1},"delay_ms":8000,"delayed_since_ts":12000`
		older  = `,"delay":8000,"running_since":12000`
		state  = `,"state_key":"key"`
	)
	at := time.UnixMilli(21_000)
	for _, test := range []struct {
		want, finalised string
		event           expiration.DelayedEvent
	}{
		{state, "", scheduled},
		{"", "", message},
		{state, `"finalised_ts":21000`, with(expiration.Final{At: at})},
		{state, `"finalised_ts":21000,"event_id":"$x"`, with(expiration.Final{At: at, EventID: "$x"})},
		{state, `"finalised_ts":21000,"error":{"errcode":"M_BAD"}`, with(expiration.Final{At: at, Error: []byte(`{"errcode":"M_BAD"}`)})},
	} {
		want, event := test.want, test.event
		older := older
		if test.finalised != "" {
			want, older = want+`,"finalised":{`+test.finalised+"}", older+","+test.finalised
		}
		for path, more := range map[string]string{stablePath: "", unstablePath: older} {
			p := &planner{events: []expiration.DelayedEvent{event}}
			for _, body := range []string{"", "{}"} {
				w := do(newPlanned(p, 1), "GET", path+"/delayed_events/"+delayID, body, true)
				require.Equal(t, http.StatusOK, w.Code)
				require.JSONEq(t, "{"+common+more+want+"}", w.Body.String())
				if path == stablePath {
					continue
				}
				for query, listed := range map[string]bool{
					"": true, "?status=scheduled": true, "?delay_id=other&delay_id=" + delayID: true, "?unknown=1": true,
					"?status=finalised": false, "?delay_id=other": false,
				} {
					w = do(newPlanned(p, 1), "GET", path+"/delayed_events"+query, body, true)
					require.Equal(t, http.StatusOK, w.Code)
					wanted := `{"delayed_events":[]}`
					if listed {
						wanted = `{"delayed_events":[{` + common + more + want + "}]}"
					}
					require.JSONEq(t, wanted, w.Body.String(), query)
				}
			}
			require.Equal(t, "look @alice:localhost", p.acts[0])
			require.Equal(t, http.StatusUnauthorized, do(newPlanned(p, 1), "GET", path+"/delayed_events/"+delayID, "", false).Code)
			w := do(newPlanned(p, 1), "GET", path+"/delayed_events/guess", "", true)
			require.Equal(t, http.StatusNotFound, w.Code)
			require.Equal(t, string(spec.ErrorNotFound), errcode(w))
		}
	}
	require.Equal(t, http.StatusUnauthorized, do(newPlanned(&planner{}, 1), "GET", unstablePath+"/delayed_events", "", false).Code)
	require.Equal(t, http.StatusNotFound, do(newPlanned(&planner{}, 1), "GET", stablePath+"/delayed_events", "", true).Code)
}

package clientapi

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The list comes in pages of bounded size, and no more is read than is shown, but for one that tells that there is more.
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

//go:build all

package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

// However often the server is told to stop while much happens: whoever syncs from one next_batch to the next sees each event.
func TestStopsLoseNoEvents(t *testing.T) {
	t.Parallel()
	const stops, rooms = 5, 4
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		var in []string
		for range rooms {
			in = append(in, s.room(t, alice, bob))
		}
		var (
			mu         sync.Mutex // guards the two maps
			sent, seen = map[string]string{}, map[string]bool{}
		)
		since := bob.must(t, http.MethodGet, "/_matrix/client/v3/sync", nil).Get("next_batch").Str
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for i, roomID := range in {
			running.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					path := fmt.Sprintf("/_matrix/client/v3/rooms/%s/send/m.room.message/stop%d-%d", url.PathEscape(roomID), i, n)
					res, err := alice.Do(ctx, http.MethodPut, path, JSON{"body": "x"})
					if err != nil || res.Code != http.StatusOK {
						time.Sleep(pollInterval)
						continue
					}
					mu.Lock()
					sent[res.Get("event_id").Str] = roomID
					mu.Unlock()
				}
			})
		}
		next := func(ctx context.Context) bool {
			res, err := bob.Do(ctx, http.MethodGet, "/_matrix/client/v3/sync?timeout=1000&since="+url.QueryEscape(since)+
				"&filter="+url.QueryEscape(`{"room":{"timeline":{"limit":1000}}}`), nil)
			if err != nil || res.Code != http.StatusOK {
				time.Sleep(pollInterval)
				return false
			}
			since = res.Get("next_batch").Str
			mu.Lock()
			defer mu.Unlock()
			res.Get("rooms.join").ForEach(func(_, room gjson.Result) bool {
				for _, e := range room.Get("timeline.events").Array() {
					seen[e.Get("event_id").Str] = true
				}
				return true
			})
			return true
		}
		var syncing sync.WaitGroup
		syncing.Go(func() {
			for ctx.Err() == nil {
				next(ctx)
			}
		})
		for range stops {
			time.Sleep(time.Duration(500+rand.IntN(500)) * time.Millisecond)
			require.NoError(t, s.Stop())
			require.NoError(t, s.Start(t.Context()))
		}
		cancel()
		running.Wait()
		syncing.Wait()
		missing := func() (n int) {
			mu.Lock()
			defer mu.Unlock()
			for eventID := range sent {
				if !seen[eventID] {
					n++
				}
			}
			return n
		}
		for until := time.Now().Add(afterCrash); missing() > 0 && time.Now().Before(until); {
			next(t.Context())
		}
		require.Zero(t, missing(), "of %d events", len(sent))
		t.Logf("%d events", len(sent))
	})
}

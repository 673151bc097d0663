//go:build all

package integration

import (
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// The time of a 404 does not show whether the room exists.
func TestSummaryTiming(t *testing.T) {
	for _, db := range databases { // one after the other, because times are compared
		t.Run(db.name, func(t *testing.T) {
			s := start(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice, bob := s.newUser(t), s.newUser(t)
			private := alice.roomWith(t, JSON{"join_rule": "invite"})
			for name, u := range map[string]*user{"bob": bob, "anybody": {s.Anonymous(), s}} {
				const rounds, requests = 3, 25 // other programs may disturb some rounds, but not all
				var ratio float64
				for range rounds {
					var took [2][]time.Duration
					for range requests {
						for i, roomID := range []string{private, "!none:localhost"} {
							start := time.Now()
							require.Equal(t, http.StatusNotFound, u.do(t, http.MethodGet, summaryPath(roomID), nil).Code)
							took[i] = append(took[i], time.Since(start))
						}
					}
					for _, all := range took {
						slices.Sort(all)
					}
					ratio = float64(took[0][requests/2]) / float64(took[1][requests/2])
					t.Logf("%s: a private room after %v, none after %v", name, took[0][requests/2], took[1][requests/2])
					if ratio > 0.8 && ratio < 1.2 {
						break
					}
				}
				require.InDelta(t, 1, ratio, 0.2, name)
			}
		})
	}
}

//go:build all

package integration

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// How much memory and how many goroutines the server uses, and that users cannot make it use more.

// usage is what the server's process uses.
type usage struct {
	resident, heap, stacks, goroutines float64
}

func (u usage) memory() float64 { return u.heap + u.stacks }

func (u usage) max(v usage) usage {
	return usage{max(u.resident, v.resident), max(u.heap, v.heap), max(u.stacks, v.stacks), max(u.goroutines, v.goroutines)}
}

func (u usage) String() string {
	const mib = 1 << 20
	return fmt.Sprintf("%6.1f  %5.1f+%-5.1f  %5.0f", u.resident/mib, u.heap/mib, u.stacks/mib, u.goroutines)
}

// usage reads the server's usage from its metrics.
func (s *server) usage(ctx context.Context) (usage, error) {
	res, err := s.Anonymous().Do(ctx, http.MethodGet, "/metrics", nil)
	if err != nil {
		return usage{}, err
	}
	var u usage
	for line := range strings.Lines(string(res.Body)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		target := map[string]*float64{
			"process_resident_memory_bytes": &u.resident, "go_memstats_heap_inuse_bytes": &u.heap,
			"go_memstats_stack_inuse_bytes": &u.stacks, "go_goroutines": &u.goroutines,
		}[name]
		if target == nil {
			continue
		}
		if *target, err = strconv.ParseFloat(value, 64); err != nil {
			return usage{}, err
		}
	}
	if u.heap == 0 || u.goroutines == 0 {
		return usage{}, fmt.Errorf("no metrics of the process: %s", res)
	}
	return u, nil
}

// A user schedules, cancels and restarts events of the maximum size in a loop. The database keeps only as many events as the limits of
// scheduled and finalised events allow. Memory holds no contents.
func TestDelayedAbuse(t *testing.T) {
	const scheduled, finalised, rounds = 40, 20, 300
	onEachDatabase(t, delayedLimits(JSON{"max_scheduled_per_user": scheduled, "max_finalised_per_user": finalised}),
		func(t *testing.T, s *server) {
			alice := s.newUser(t)
			roomID := s.room(t, alice)
			large := strings.Repeat("x", 60_000)
			before, err := s.usage(t.Context())
			require.NoError(t, err)
			for range scheduled {
				alice.delayMessage(t, roomID, time.Hour, large)
			}
			for range rounds {
				res := alice.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"60000", JSON{"body": large})
				require.Equal(t, http.StatusTooManyRequests, res.Code, res)
			}
			oldest := alice.scheduled(t)
			for _, id := range oldest {
				for range rounds / scheduled {
					alice.acted(t, unstableDelayed, id, "restart")
				}
			}
			kept := oldest[0]
			for range rounds {
				alice.acted(t, unstableDelayed, kept, "cancel")
				kept = alice.delayMessage(t, roomID, time.Hour, large)
			}
			require.Len(t, alice.scheduled(t), scheduled)
			eventually(t, "memory is as it was", func() bool {
				after, err := s.usage(t.Context())
				require.NoError(t, err)
				return after.memory() < before.memory()+32<<20
			})
			var rows, bytes int64
			s.database(t, "expiration", func(cm *sqlutil.Connections, options *config.DatabaseOptions) {
				db, _, err := cm.Connection(options)
				require.NoError(t, err)
				require.NoError(t, db.QueryRowContext(t.Context(), "SELECT COUNT(*), SUM(LENGTH(content)) FROM"+
					" (SELECT content FROM expiration_timers UNION ALL SELECT content FROM expiration_finalised) AS all_contents",
				).Scan(&rows, &bytes))
			})
			require.EqualValues(t, scheduled+finalised, rows)
			require.LessOrEqual(t, bytes, int64((scheduled+finalised)*64<<10))
		})
}

// A refresh hangs, and its client gives up and tries again, many times. A request whose client has hung up uses no more goroutines. When
// the database continues, the next refresh succeeds.
func TestKeepAlivesThatHangUp(t *testing.T) {
	t.Parallel()
	s := startWithFailpoints(t, homeserver.Config{Expiration: unlimited})
	alice := s.newUser(t)
	sent := alice.sendMessage(t, s.room(t, alice), 600)
	before, err := s.usage(t.Context())
	require.NoError(t, err)
	require.NoError(t, s.Failpoints(string(failpoint.BeforeRefresh)+" hold"))
	const clients, tries, patience, few = 100, 3, time.Second, 30
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range tries {
				ctx, hangUp := context.WithTimeout(t.Context(), patience)
				_, _ = s.Anonymous().KeepAlive(ctx, "refresh", sent.token)
				hangUp()
			}
		})
	}
	wg.Wait()
	require.Eventually(t, func() bool {
		now, err := s.usage(t.Context())
		return err == nil && now.goroutines < before.goroutines+few
	}, soon, 100*time.Millisecond, "requests of clients who have hung up are still waiting")
	require.NoError(t, s.Failpoints())
	code, _ := s.keepAlive(t, "refresh", sent.token)
	require.Equal(t, http.StatusOK, code)
}

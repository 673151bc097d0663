//go:build all

package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

var (
	crashes = flag.Int("crashes", 75, "how many times TestCrashes crashes each of its servers")
	seed    = flag.Uint64("seed", 1, "what the random choices of TestCrashes are made from")
)

// roundTime is how long a server may run without reaching its crash point, and rareTime the same for a crash point that is seldom reached.
const (
	roundTime = 3 * time.Second
	rareTime  = 10 * time.Second
)

// crashPoints are the places where TestCrashes kills the server.
var crashPoints = []failpoint.Point{
	failpoint.BeforeInsert, failpoint.AfterInsert, failpoint.AfterDoubt, failpoint.BeforeInput, failpoint.AfterInput, failpoint.BeforeAnswer,
	failpoint.BeforeRefresh, failpoint.AfterRefresh, failpoint.BeforeDrop, failpoint.BeforeClaim, failpoint.AfterClaim,
	failpoint.BeforeResubmit, failpoint.AfterClosing, failpoint.AfterLoad, failpoint.AfterDelete, failpoint.BeforeConfirm,
	failpoint.AfterConfirm, failpoint.Stream,
}

// docs/protocol.md, section 5: random clients act, and the server kills itself with SIGKILL at each place in the life of an event, also
// during recovery. Then it starts again on the same data. The clients repeat requests that had no answer, and go on. In the end all
// answers were true, no event was lost or sent twice, and no event was early.
func TestCrashes(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			l := newLedger()
			for range 4 {
				l.newActor(t, s, *seed)
			}
			s.Kill()
			random := rand.New(rand.NewPCG(*seed, 0))
			hits := map[failpoint.Point]int{}
			for n := range *crashes {
				point := crashPoints[n%len(crashPoints)]
				if s.crashAt(t, l, point, random) {
					hits[point]++
				}
				l.crashed(s.timers(t))
				if random.IntN(3) == 0 { // so that more events expire while the server is down
					<-time.After(time.Duration(random.IntN(1500)) * time.Millisecond)
				}
			}
			t.Logf("%d crashes, of them at the chosen place: %v", *crashes, hits)
			if *crashes >= 4*len(crashPoints) {
				for _, point := range crashPoints {
					require.NotZero(t, hits[point], "never came to %s", point)
				}
			}

			require.NoError(t, s.Failpoints())
			require.NoError(t, s.Start(t.Context()))
			l.verify(t, s)
		})
	}
}

// crashAt starts the server and lets the actors act until the server crashes at the given point. After some time it kills the server
// anyway. It reports whether the server crashed by itself.
func (s *server) crashAt(t *testing.T, l *ledger, point failpoint.Point, random *rand.Rand) bool {
	t.Helper()
	times, life := 1+random.IntN(8), roundTime
	switch point {
	case failpoint.AfterLoad, failpoint.BeforeResubmit: // reached once in a process, or rarely
		times = 1
	case failpoint.AfterDoubt, failpoint.BeforeDrop, failpoint.BeforeRefresh, failpoint.AfterRefresh: // also rare
		times, life = 1+random.IntN(2), rareTime
	}
	line := fmt.Sprintf("%s kill %d", point, times)
	if point == failpoint.BeforeInput { // crash somewhere inside the roomserver
		line += fmt.Sprintf(" %dus", random.IntN(30_000))
	}
	require.NoError(t, s.Failpoints(line))
	if err := s.Start(t.Context()); errors.Is(err, homeserver.ErrEnded) {
		return true
	} else {
		require.NoError(t, err)
	}
	defer s.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), life)
	defer cancel()
	var actors sync.WaitGroup
	for _, a := range l.actors {
		actors.Go(func() { a.act(ctx) })
	}
	select {
	case <-s.Ended():
	case <-ctx.Done():
		s.Kill()
	}
	cancel()
	actors.Wait()
	return ctx.Err() == context.Canceled
}

// verify waits until all timers have ended, reads the events, and requires that the ledger has no faults.
func (l *ledger) verify(t *testing.T, s *server) {
	t.Helper()
	l.settle(t, s)
	l.checkTokens(t.Context())
	current := l.current(t)
	events := s.events(t)
	l.visible(t, events)
	l.check(events, s.timers(t), current)
	l.checkDelayed(t.Context(), events)
	answers := map[int]int{}
	for _, a := range l.actors {
		for code, n := range a.answers {
			answers[code] += n
		}
	}
	t.Logf("%d events in %d rooms, answers: %v", len(events), len(l.actors), answers)
	l.require(t, s)
}

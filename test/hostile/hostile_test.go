//go:build all

package hostile

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// These bounds limit what hostile users may cost others under the default limits, see docs/guarantees.md.
const (
	// slowestSend limits a send of a bystander on the usual machine. The send may also set state that attackers set.
	slowestSend = 5 * time.Second
	// memoryBound limits the growth of the server's memory during an attack.
	memoryBound = 512 << 20
	// diskPerAccount limits how much an account may make the timers' database grow in one attack.
	diskPerAccount = 32 << 20
)

// Hostile users have many accounts, and strangers many addresses. A bystander's timers are closed in time all the same, and memory and
// disk usage stay bounded.
func TestHostileUsers(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, db database) {
		s := newSiege(t, db)
		defer func() { t.Log("\n" + strings.Join(s.table, "\n")) }()
		stranger := &attacker{
			Client: &homeserver.Client{URL: s.s.URL, HTTP: transport}, s: s, answers: map[string]int{},
		}
		s.under(t, "nothing", nil)
		for _, attack := range attacks {
			switch {
			case attack.open:
				s.under(t, attack.name, []*attacker{stranger}, attack)
			default:
				s.under(t, attack.name, s.attackers[:1], attack)
				s.under(t, attack.name, s.attackers, attack)
			}
		}
		s.under(t, "all together", s.attackers, attacks...)
	})
}

// judge adds a line to the table, and fails the test if a bound is exceeded.
func (s *siege) judge(t *testing.T, name string, attackers int, f figuresOf) {
	t.Helper()
	const mega = 1 << 20
	if s.table == nil {
		s.table = append(s.table, fmt.Sprintf("%-40s %3s | %7s | %25s | %15s | %9s | %9s | %9s | %s",
			"attack", "by", "before", "lateness p50, p99, max; seen, /sync behind", "send p50, max", "neighbour", "RSS MB", "disk MB", "answers"))
	}
	by := s.attackers[:min(attackers, len(s.attackers))]
	s.table = append(s.table, fmt.Sprintf("%-40s %3d | %7s | %25s | %15s | %9s | %4d %+4d | %+9d | %s", name, attackers, f.recovered,
		fmt.Sprint(f.median, " ", f.p99, " ", f.max, "; ", f.seen, " ", f.behind), fmt.Sprint(f.sendMedian, " ", f.sendLatest), f.neighbour,
		f.memory/mega, f.grown/mega, f.disk/mega, answersOf(by)))
	if !s.s.alive() {
		t.Fatalf("%s: the process ended", name)
	}
	bound := s.s.lateness()
	if attackers > 1 {
		// Ten accounts with forty connections that send without limits keep two cores busy, as in stock Dendrite. All sends take longer, and a
		// closing event is a send. So the bound grows by the slowest send.
		bound += f.sendLatest
	}
	if f.p99 > bound {
		t.Errorf("%s by %d: the bystander's events are late: p99 %s, overdue %d: %s", name, attackers, f.p99, f.overdue, strings.Join(f.slow, "; "))
	}
	if slowest := max(f.sendLatest, f.neighbour); slowest > s.s.factor*slowestSend {
		t.Errorf("%s by %d: a bystander's send took %s", name, attackers, slowest)
	}
	for answer, n := range f.refused {
		t.Errorf("%s by %d: the bystander is refused %d times: %.300s", name, attackers, n, answer)
	}
	if f.grown > memoryBound {
		t.Errorf("%s by %d: the server took %d MB more memory", name, attackers, f.grown/mega)
	}
	if f.disk > int64(max(attackers, 1))*diskPerAccount {
		t.Errorf("%s by %d: the timers' database grew by %d MB", name, attackers, f.disk/mega)
	}
}

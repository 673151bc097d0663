package index

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Invariants finds each violation.
func TestInvariants(t *testing.T) {
	for name, breaks := range map[string]func(x *Index, tm *Timer){
		"forgotten":      func(x *Index, tm *Timer) { x.unschedule(tm) },
		"not by token":   func(x *Index, tm *Timer) { delete(x.byToken, tokenKey(tm.Token())) },
		"not by state":   func(x *Index, tm *Timer) { x.byState.remove(tm.state, tm) },
		"not by sender":  func(x *Index, tm *Timer) { x.bySender[tm.kind].remove(tm.sender, tm) },
		"the count":      func(x *Index, tm *Timer) { x.expiring++ },
		"a wrong phase":  func(x *Index, tm *Timer) { tm.phase = Stopped },
		"pending":        func(x *Index, tm *Timer) { tm.phase = Pending },
		"gone":           func(x *Index, tm *Timer) { tm.phase = Gone },
		"refused":        func(x *Index, tm *Timer) { x.refused[tm] = 9 },
		"superseded":     func(x *Index, tm *Timer) { tm.doubts = Superseded },
		"left":           func(x *Index, tm *Timer) { x.left[tm] = struct{}{} },
		"by its request": func(x *Index, tm *Timer) { x.Stop(tm); x.byRequest[7] = tm },
	} {
		x := New()
		x.Load(Row{NID: 1, Token: token(1), Sender: 1, State: 1}, 1)
		tm := x.Load(Row{NID: 2, Token: token(2), Sender: 1, State: 1, Request: 7}, 2)
		require.NoError(t, x.Link())
		require.NoError(t, x.Invariants())
		breaks(x, tm)
		require.Error(t, x.Invariants(), name)
	}
}

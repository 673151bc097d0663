package keeper

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

func TestMetrics(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		m := w.connected(leaveOf(1), time.Hour)
		w.waiting(leaveOf(2), time.Hour)
		require.EqualValues(t, 2, testutil.ToFloat64(w.metrics.kept))
		time.Sleep(time.Minute)
		w.silence(errFault)
		time.Sleep(time.Minute)
		w.silence(nil)
		w.failing(errFault, "finish")
		time.Sleep(time.Minute)
		w.crashes(m)
		time.Sleep(time.Minute)
		w.failing(nil)
		time.Sleep(time.Minute)
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.ended.WithLabelValues("finished")))
		require.NotZero(t, testutil.ToFloat64(w.metrics.looks.WithLabelValues("answered")))
		require.NotZero(t, testutil.ToFloat64(w.metrics.looks.WithLabelValues("silent")))
		require.NotZero(t, testutil.ToFloat64(w.metrics.failures.WithLabelValues("finish")))
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.hints.WithLabelValues(string(livekit.ParticipantLeft))))
		w.leaves(w.remembered(5))
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.removed))
		require.Len(t, w.Collectors(), 6)
	})
}

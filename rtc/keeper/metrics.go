package keeper

import "github.com/prometheus/client_golang/prometheus"

// metrics are the keeper's metrics. No label has values that users choose.
type metrics struct {
	kept     prometheus.GaugeFunc
	ended    *prometheus.CounterVec
	looks    *prometheus.CounterVec
	hints    *prometheus.CounterVec
	failures *prometheus.CounterVec
	removed  prometheus.Counter
}

func newMetrics(kept func() float64) *metrics {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "dendrite", Subsystem: "rtc", Name: name, Help: help}
	}
	return &metrics{
		kept: prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts("delegations",
			"How many timers are kept alive by what LiveKit says")), kept),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts(opts("delegations_ended_total",
			"How many delegations have ended: finished, replaced or over")), []string{"how"}),
		looks: prometheus.NewCounterVec(prometheus.CounterOpts(opts("looks_total",
			"How many looks at rooms of LiveKit were answered or silent")), []string{"result"}),
		hints: prometheus.NewCounterVec(prometheus.CounterOpts(opts("hints_total",
			"How many events of LiveKit's webhooks arrived that tell who is connected, by their kind")), []string{"kind"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts(opts("failures_total",
			"How many steps failed and are repeated: note, keep, check, finish or remove")), []string{"step"}),
		removed: prometheus.NewCounter(prometheus.CounterOpts(opts("removed_total",
			"How many participants were removed from LiveKit because they are not joined to the room"))),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.kept, m.ended, m.looks, m.hints, m.failures, m.removed}
}

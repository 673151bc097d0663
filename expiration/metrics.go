package expiration

import "github.com/prometheus/client_golang/prometheus"

// metrics are the engine's own metrics. No label has values that users choose.
type metrics struct {
	running   prometheus.GaugeFunc
	scheduled prometheus.GaugeFunc
	closings  *prometheus.CounterVec
	finalised *prometheus.CounterVec
	drops     *prometheus.CounterVec
	lateness  prometheus.Histogram
	retries   prometheus.Counter
	errors    *prometheus.CounterVec
}

func newMetrics(running, scheduled func() float64) *metrics {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "dendrite", Subsystem: "expiration", Name: name, Help: help}
	}
	return &metrics{
		running: prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts("running_timers",
			"How many expiring events are running")), running),
		scheduled: prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts("scheduled_events",
			"How many delayed events are scheduled")), scheduled),
		closings: prometheus.NewCounterVec(prometheus.CounterOpts(opts("closings_total",
			"How many closing events were sent, by their outcome")), []string{"outcome"}),
		finalised: prometheus.NewCounterVec(prometheus.CounterOpts(opts("finalised_total",
			"How many delayed events were finalised, by what became of them: sent, cancelled or error")), []string{"result"}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts(opts("drops_total",
			"How many timers were dropped without a closing event, by the reason")), []string{"reason"}),
		lateness: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "dendrite", Subsystem: "expiration", Name: "closing_lateness_seconds",
			Help:    "How long after its deadline the closing event of an expired event, or a delayed event, was in the room",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 3600},
		}),
		retries: prometheus.NewCounter(prometheus.CounterOpts(opts("closing_retries_total",
			"How many attempts to close an event, or to send a delayed one, failed and will be repeated"))),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts(opts("errors_total",
			"How many operations on the database or the roomserver failed")), []string{"operation"}),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.running, m.scheduled, m.closings, m.finalised, m.drops, m.lateness, m.retries, m.errors}
}

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
	const namespace, subsystem = "dendrite", "expiration"
	return &metrics{
		running: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "running_timers",
			Help: "How many expiring events are running",
		}, running),
		scheduled: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "scheduled_events",
			Help: "How many delayed events are scheduled",
		}, scheduled),
		closings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "closings_total",
			Help: "How many closing events were sent, by their outcome",
		}, []string{"outcome"}),
		finalised: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "finalised_total",
			Help: "How many delayed events were finalised, by what became of them: sent, cancelled or error",
		}, []string{"result"}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "drops_total",
			Help: "How many timers were dropped without a closing event, by the reason",
		}, []string{"reason"}),
		lateness: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "closing_lateness_seconds",
			Help:    "How long after its deadline the closing event of an expired event, or a delayed event, was in the room",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 3600},
		}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "closing_retries_total",
			Help: "How many attempts to close an event, or to send a delayed one, failed and will be repeated",
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "errors_total",
			Help: "How many operations on the database or the roomserver failed",
		}, []string{"operation"}),
	}
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.running, m.scheduled, m.closings, m.finalised, m.drops, m.lateness, m.retries, m.errors}
}

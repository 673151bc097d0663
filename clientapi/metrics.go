package clientapi

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	keepAlives *prometheus.CounterVec
}

func newMetrics() *metrics {
	return &metrics{
		keepAlives: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "dendrite", Subsystem: "expiration", Name: "keep_alives_total",
			Help: "How many requests the keep-alive endpoint answered, by method and result",
		}, []string{"method", "result"}),
	}
}

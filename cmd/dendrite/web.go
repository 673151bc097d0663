package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	sentryhttp "github.com/getsentry/sentry-go/http"
	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/setup/base"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/sirupsen/logrus"
)

const (
	// headTimeout is how long a request's head may take to arrive, and how long a new connection may stay silent.
	headTimeout = 30 * time.Second
	// idleTimeout is how long a connection is kept for the next request. It is longer than the timeout of proxies, which otherwise might
	// reuse a connection at the moment in which this server closes it.
	idleTimeout = 5 * time.Minute
	// maxHead limits the size of a request's head, in bytes. Go's default is a megabyte, and the routers match hundreds of regular
	// expressions against a path, which would take seconds. The longest sensible path has three names of 255 bytes, each of them escaped.
	maxHead = 64 << 10
)

// handler returns the HTTP handler of the server. It is the same as that of Dendrite's SetupAndServeHTTP, except that keep-alives are
// routed first.
func (s *server) handler() http.Handler {
	addDendritesPages(s.cfg, s.routers)
	router := mux.NewRouter().SkipClean(true).UseEncodedPath()
	router.NotFoundHandler, router.MethodNotAllowedHandler = httputil.NotFoundCORSHandler, httputil.NotAllowedHandler
	router.Handle("/", http.RedirectHandler(httputil.PublicStaticPath, http.StatusFound))
	if metrics := s.cfg.Global.Metrics; metrics.Enabled {
		router.Handle("/metrics", httputil.WrapHandlerInBasicAuth(promhttp.Handler(), metrics.BasicAuth))
	}
	watched := func(h http.Handler) http.Handler { return h }
	if s.cfg.Global.Sentry.Enabled {
		watched = sentryhttp.New(sentryhttp.Options{Repanic: true}).Handle
	}
	router.PathPrefix(httputil.DendriteAdminPathPrefix).Handler(s.routers.DendriteAdmin)
	router.PathPrefix(httputil.PublicClientPathPrefix).Handler(watched(s.routers.Client))
	if !s.cfg.Global.DisableFederation {
		router.PathPrefix(httputil.PublicKeyPathPrefix).Handler(s.routers.Keys)
		router.PathPrefix(httputil.PublicFederationPathPrefix).Handler(watched(s.routers.Federation))
	}
	router.PathPrefix(httputil.SynapseAdminPathPrefix).Handler(s.routers.SynapseAdmin)
	router.PathPrefix(httputil.PublicMediaPathPrefix).Handler(s.routers.Media)
	router.PathPrefix(httputil.PublicWellKnownPrefix).Handler(s.routers.WellKnown)
	router.PathPrefix(httputil.PublicStaticPath).Handler(s.routers.Static)
	return s.extension.KeepAlivesFirst(router)
}

// addDendritesPages adds the routes that only SetupAndServeHTTP adds: the landing page, the login fallback, and the pages for monitors.
// The call has no address and a stopped process, so it does nothing else. Its log lines are suppressed: it claims to stop listeners, which
// do not exist, and it repeats lines that handler causes.
func addDendritesPages(cfg *config.Dendrite, routers httputil.Routers) {
	stopped := process.NewProcessContext()
	stopped.ShutdownDendrite()
	defer logrus.SetLevel(logrus.GetLevel())
	logrus.SetLevel(min(logrus.GetLevel(), logrus.ErrorLevel))
	base.SetupAndServeHTTP(stopped, cfg, routers, config.ServerAddress{}, nil, nil)
}

// startToServe listens at an address and serves requests. Requests are cancelled when the process is told to stop.
func startToServe(web *process.ProcessContext, address config.ServerAddress, handler http.Handler) (*http.Server, error) {
	l, err := open(address)
	if err != nil {
		return nil, err
	}
	s := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: headTimeout,
		MaxHeaderBytes:    maxHead,
		IdleTimeout:       idleTimeout,
		WriteTimeout:      base.HTTPServerTimeout,
		BaseContext:       func(net.Listener) context.Context { return web.Context() },
	}
	logrus.Infof("Starting external listener on %s", address.Address)
	go func() {
		var err error
		if address.Scheme == "https" {
			err = s.ServeTLS(l, *certFile, *keyFile)
		} else {
			err = s.Serve(l)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			logrus.WithError(err).Fatalf("Failed to serve at %s", address.Address)
		}
	}()
	return s, nil
}

// open listens at an address. From then on clients can connect, but they wait until the server accepts them.
func open(address config.ServerAddress) (net.Listener, error) {
	if !address.IsUnixSocket() {
		return net.Listen("tcp", address.Address)
	}
	if err := os.Remove(address.Address); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", address.Address)
	if err != nil {
		return nil, err
	}
	if err = os.Chmod(address.Address, address.UnixSocketPermission); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

package main

import (
	"context"
	"database/sql"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/getsentry/sentry-go"
	"github.com/kardianos/minwinsvc"
	"github.com/matrix-org/dendrite/appservice"
	"github.com/matrix-org/dendrite/federationapi"
	"github.com/matrix-org/dendrite/internal"
	"github.com/matrix-org/dendrite/internal/caching"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/roomserver"
	"github.com/matrix-org/dendrite/setup"
	"github.com/matrix-org/dendrite/setup/base"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/dendrite/setup/mscs"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/matrix-org/dendrite/userapi"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140"
	msc4140config "github.com/matrix-org/dendrite/setup/mscs/msc4140/config"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
)

const (
	// requestTimeout is how long a stopping server waits for running requests. Their contexts end at once, but a client that sends its body
	// byte by byte does not notice.
	requestTimeout = 10 * time.Second
	// drainTimeout is how long the server then waits for its streams.
	drainTimeout = 5 * time.Second
)

// server is a Dendrite that is ready to serve.
type server struct {
	process   *process.ProcessContext
	cfg       *config.Dendrite
	routers   httputil.Routers
	nats      *jetstream.NATSInstance
	extension *msc4140.Extension
	accounts  *sql.DB
}

// build creates all of Dendrite's components, as its own command does, with the extension between the roomserver and the other components.
func build(cfg *config.Dendrite, extensionCfg *msc4140config.Config, h *home) (s *server, err error) {
	s = &server{
		process: process.NewProcessContext(), cfg: cfg,
		routers: httputil.NewRouters(), nats: &jetstream.NATSInstance{},
	}
	internal.SetupStdLogging()
	internal.SetupHookLogging(cfg.Logging)
	if h != nil {
		h.quiet(cfg)
	}
	internal.SetupPprof()
	base.PlatformSanityChecks()
	logrus.Infof("Version %s", version())
	if !cfg.ClientAPI.RegistrationDisabled && cfg.ClientAPI.OpenRegistrationWithoutVerificationEnabled {
		logrus.Warn("Open registration is enabled")
	}

	// Dendrite's components give up by panicking.
	defer func() {
		if failed := asError(recover()); failed != nil {
			err = failed
		}
	}()
	if err = s.observe(); err != nil {
		return nil, err
	}
	var dnsCache *fclient.DNSCache
	if cfg.Global.DNSCache.Enabled {
		dnsCache = fclient.NewDNSCache(cfg.Global.DNSCache.CacheSize, cfg.Global.DNSCache.CacheLifetime)
	}
	federationClient := base.CreateFederationClient(cfg, dnsCache)
	connections := sqlutil.NewConnectionManager(s.process, cfg.Global.DatabaseOptions)
	caches := caching.NewRistrettoCache(cfg.Global.Cache.EstimatedMaxSize, cfg.Global.Cache.MaxAge, caching.EnableMetrics)

	rsAPI := roomserver.NewInternalAPI(s.process, cfg, connections, s.nats, caches, caching.EnableMetrics)
	s.extension, err = msc4140.New(s.process, extensionCfg, cfg, connections, s.nats, rsAPI, caching.EnableMetrics)
	if err != nil {
		return nil, err
	}
	rsAPI = s.extension.RoomserverAPI()
	fsAPI := federationapi.NewInternalAPI(s.process, cfg, connections, s.nats, federationClient, rsAPI, caches, nil, false)
	keyRing := fsAPI.KeyRing()
	rsAPI.SetFederationAPI(fsAPI, keyRing)
	userAPI := userapi.NewInternalAPI(
		s.process, cfg, connections, s.nats, rsAPI, federationClient, caching.EnableMetrics, fsAPI.IsBlacklistedOrBackingOff,
	)
	if s.accounts, _, err = connections.Connection(&cfg.UserAPI.AccountDatabase); err != nil {
		return nil, err
	}
	asAPI := appservice.NewInternalAPI(s.process, cfg, s.nats, userAPI, rsAPI)
	rsAPI.SetAppserviceAPI(asAPI)
	rsAPI.SetUserAPI(userAPI)

	monolith := setup.Monolith{
		Config: cfg, KeyRing: keyRing,
		Client: base.CreateClient(cfg, dnsCache), FedClient: federationClient,
		AppserviceAPI: asAPI, FederationAPI: fsAPI, RoomserverAPI: rsAPI, UserAPI: s.extension.UserAPI(userAPI),
	}
	s.extension.AddPublicRoutes(s.routers, userAPI, msc4140.Federation{KeyRing: keyRing, Client: monolith.Client})
	monolith.AddAllPublicRoutes(s.process, cfg, s.routers, connections, s.nats, caches, caching.EnableMetrics)
	if len(cfg.MSCs.MSCs) > 0 {
		if err = mscs.Enable(cfg, connections, s.routers, &monolith, caches); err != nil {
			return nil, fmt.Errorf("failed to enable MSCs: %w", err)
		}
	}
	up := prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: "dendrite", Name: "up",
		ConstLabels: map[string]string{"version": internal.VersionString()},
	})
	up.Add(1)
	if err = prometheus.Register(up); err != nil {
		return nil, err
	}
	return s, s.extension.Start()
}

// observe sets up tracing and Sentry.
func (s *server) observe() error {
	tracing, err := s.cfg.SetupTracing()
	if err != nil {
		return fmt.Errorf("failed to start tracing: %w", err)
	}
	s.atShutdown(func() { _ = tracing.Close() })
	if !s.cfg.Global.Sentry.Enabled {
		return nil
	}
	if err = sentry.Init(sentry.ClientOptions{
		Dsn:              s.cfg.Global.Sentry.DSN,
		Environment:      s.cfg.Global.Sentry.Environment,
		Debug:            true,
		ServerName:       string(s.cfg.Global.ServerName),
		Release:          "dendrite@" + internal.VersionString(),
		AttachStacktrace: true,
	}); err != nil {
		return fmt.Errorf("failed to start Sentry: %w", err)
	}
	s.atShutdown(func() {
		if !sentry.Flush(5 * time.Second) {
			logrus.Warn("Failed to flush all Sentry events")
		}
	})
	return nil
}

// atShutdown calls f when the server shuts down, before the process ends.
func (s *server) atShutdown(f func()) {
	s.process.ComponentStarted()
	go func() {
		defer s.process.ComponentFinished()
		<-s.process.WaitForShutdown()
		f()
	}()
}

// serve serves HTTP until the process is told to stop, and then stops the parts in order.
func (s *server) serve(listen addresses, h *home) error {
	web := process.NewProcessContext()
	minwinsvc.SetOnExit(web.ShutdownDendrite)
	handler := s.handler()
	var servers []*http.Server
	for _, address := range []config.ServerAddress{listen.http, listen.https} {
		if !address.Enabled() {
			continue
		}
		listening, err := startToServe(web, address, handler)
		if err != nil {
			return fmt.Errorf("cannot listen: %w", err)
		}
		servers = append(servers, listening)
	}
	if h != nil {
		h.welcome(listen.http.Address, s.accounts)
	}
	base.WaitForShutdown(web)
	var stopping sync.WaitGroup
	for _, listening := range servers {
		stopping.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
			defer cancel()
			if listening.Shutdown(ctx) != nil {
				_ = listening.Close()
			}
		})
	}
	stopping.Wait()
	s.extension.Stop()
	s.drain()
	s.process.ShutdownDendrite()
	s.process.WaitForComponentsToFinish()
	return nil
}

// drain gives Dendrite's components some time to process the messages in the streams.
func (s *server) drain() {
	ctx, cancel := context.WithTimeout(s.process.Context(), drainTimeout)
	defer cancel()
	js, _ := s.nats.Prepare(s.process, &s.cfg.Global.JetStream)
	dendritefix.Drain(ctx, js, &s.cfg.Global.JetStream)
}

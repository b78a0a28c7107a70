from app import SSPFormerApp

SSPFormerApp().run()
